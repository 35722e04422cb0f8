/* Makes chosen file system calls fail, in this process and in every process it starts. Preloaded (LD_PRELOAD); told what to do, at any moment, by
 * the shared memory of the file that FAULTFS names: `struct control`, whose other side is faultfs.py. It sees what goes through libc's functions, as
 * all of Python's calls do; not page faults of mapped files, not io_uring, not libc's own calls (stdio).
 *
 * A write that fails has written half of it, in whole blocks: a caller that believes in all or nothing is found out. Every other call that fails has
 * done nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PATH = 512, TRACED = 8192, BLOCK = 4096, ENVIRONMENT = 4096 };
enum kind { WRITE = 1, SYNC = 2, CREATE = 4, NAME = 8, ALLOCATE = 16, REMOVE = 32, MARK = 64, READ = 128, LOOK = 256 };

struct control {
    uint32_t kinds;       /* which calls are counted; 0: none */
    int32_t error;        /* the errno of those that fail; 0: `victim` and whoever makes the call die there, before it is made */
    int64_t victim;       /* a process */
    uint64_t first, last; /* which of them fail, counted from 1; first 0: none */
    uint64_t from, to;    /* only reads and writes that touch these bytes of the file; to 0: all */
    uint64_t seen;        /* how many were counted */
    uint64_t failed;      /* how many failed */
    char glob[PATH];      /* fnmatch(3) of the absolute path, without special characters for '/' */
    struct { char call[16]; char path[PATH]; } trace[TRACED]; /* what was counted, from the first on */
};

static struct control *shared;
static char preload[PATH + 16], told[PATH + 16], *control_file = told + sizeof "FAULTFS=" - 1;
static int (*real_execve)(const char *, char *const[], char *const[]);

#define REAL(name) __extension__({ \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
    real; })

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTFS"), *self = getenv("LD_PRELOAD");
    int fd = path && self ? REAL(open64)(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) {
        fputs("faultfs: FAULTFS names no file that can be opened\n", stderr);
        abort();
    }
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REAL(close)(fd);
    if (shared == MAP_FAILED) abort();
    real_execve = (__typeof__(real_execve))dlsym(RTLD_NEXT, "execve");
    snprintf(preload, sizeof preload, "LD_PRELOAD=%s", self);
    snprintf(told, sizeof told, "FAULTFS=%s", path);
}

/* The children are followed whatever environment they are given. On the stack: the caller may be between vfork and exec. */
int execve(const char *path, char *const argv[], char *const envp[]) {
    const char *with[ENVIRONMENT];
    size_t count = 0;
    for (; *envp && count < ENVIRONMENT - 3; envp++)
        if (strncmp(*envp, "LD_PRELOAD=", 11) != 0 && strncmp(*envp, "FAULTFS=", 8) != 0) with[count++] = *envp;
    with[count++] = preload;
    with[count++] = told;
    with[count] = NULL;
    return real_execve(path, argv, (char *const *)with);
}

/* What `hit_path` tells, while the rule stays as it is. */
static int judge(enum kind kind, const char *call, const char *path, off64_t offset, size_t length) {
    if (!(shared->kinds & kind)) return 0;
    if (fnmatch(shared->glob, path, 0) != 0) return 0;
    if (shared->to && length && ((uint64_t)offset >= shared->to || (uint64_t)offset + length <= shared->from)) return 0;
    uint64_t number = __atomic_add_fetch(&shared->seen, 1, __ATOMIC_SEQ_CST);
    if (number <= TRACED) {
        snprintf(shared->trace[number - 1].call, sizeof shared->trace[0].call, "%s", call);
        snprintf(shared->trace[number - 1].path, PATH, "%s", path);
    }
    if (!shared->first || number < shared->first || number > shared->last) return 0;
    __atomic_add_fetch(&shared->failed, 1, __ATOMIC_SEQ_CST);
    if (!shared->error) {
        kill((pid_t)shared->victim, SIGKILL);
        kill(getpid(), SIGKILL);
    }
    return 1;
}

/* Whether this call is to fail; it is counted if it is one of those that matter. `length` 0: it has no place in the file.
 *
 * Judged under a lock that faultfs.py takes for itself to change the rule: once a rule is lifted, nothing fails or dies by it. The lock is of an
 * open file of this call's own, so that threads share it as processes do, and the kernel takes it back from whoever is killed. */
static int hit_path(enum kind kind, const char *call, const char *path, off64_t offset, size_t length) {
    if (!shared || !(shared->kinds & kind)) return 0;
    int lock = REAL(open64)(control_file, O_RDONLY | O_CLOEXEC);
    if (lock < 0) abort();
    while (flock(lock, LOCK_SH) < 0)
        if (errno != EINTR) abort();
    int hit = judge(kind, call, path, offset, length);
    REAL(close)(lock);
    return hit;
}

static int failing(void) {
    errno = shared->error;
    return -1;
}

static void place(int fd, char *path) {
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH - 1);
    path[length < 0 ? 0 : length] = 0;
}

static int hit_fd(enum kind kind, const char *call, int fd, off64_t offset, size_t length) {
    int before = errno;
    char path[PATH];
    if (!shared || !(shared->kinds & kind)) return 0;
    place(fd, path);
    int hit = path[0] == '/' && hit_path(kind, call, path, offset < 0 ? lseek64(fd, 0, SEEK_CUR) : offset, length);
    errno = before;
    return hit;
}

static int hit_at(enum kind kind, const char *call, int directory, const char *name) {
    int before = errno;
    char path[2 * PATH] = "";
    if (!shared || !(shared->kinds & kind) || !name) return 0;
    if (name[0] != '/') {
        if (directory == AT_FDCWD) {
            if (!getcwd(path, PATH)) path[0] = 0;
        } else
            place(directory, path);
        strcat(path, "/");
    }
    strncat(path, name, PATH - 1);
    path[PATH - 1] = 0;
    int hit = hit_path(kind, call, path, 0, 0);
    errno = before;
    return hit;
}

static size_t half(size_t length) { return length / 2 >= BLOCK ? length / 2 / BLOCK * BLOCK : length < BLOCK ? length / 2 : 0; }

/* -- bytes */

ssize_t write(int fd, const void *data, size_t length) {
    if (!hit_fd(WRITE, "write", fd, -1, length)) return REAL(write)(fd, data, length);
    if (REAL(write)(fd, data, half(length)) < 0) return -1;
    return failing();
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) {
    if (!hit_fd(WRITE, "pwrite", fd, offset, length)) return REAL(pwrite64)(fd, data, length, offset);
    if (half(length) && REAL(pwrite64)(fd, data, half(length), offset) < 0) return -1;
    return failing();
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    return hit_fd(WRITE, "writev", fd, -1, 1) ? failing() : REAL(writev)(fd, parts, count);
}

ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    return hit_fd(WRITE, "pwritev", fd, offset, 1) ? failing() : REAL(pwritev64v2)(fd, parts, count, offset, flags);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t length) {
    return hit_fd(WRITE, "sendfile", out, -1, length) ? failing() : REAL(sendfile64)(out, in, offset, length);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t length, unsigned flags) {
    return hit_fd(WRITE, "copy_file_range", out, -1, length) ? failing() : REAL(copy_file_range)(in, from, out, to, length, flags);
}

int ioctl(int fd, unsigned long request, ...) {
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    return request == FICLONE && hit_fd(WRITE, "ficlone", fd, 0, 1) ? failing() : REAL(ioctl)(fd, request, argument);
}

ssize_t read(int fd, void *data, size_t length) {
    return hit_fd(READ, "read", fd, -1, length) ? failing() : REAL(read)(fd, data, length);
}

ssize_t pread64(int fd, void *data, size_t length, off64_t offset) {
    return hit_fd(READ, "pread", fd, offset, length) ? failing() : REAL(pread64)(fd, data, length, offset);
}

ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    size_t length = 0;
    for (int i = 0; i < count; i++) length += parts[i].iov_len;
    return hit_fd(READ, "preadv", fd, offset, length) ? failing() : REAL(preadv64v2)(fd, parts, count, offset, flags);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) { return preadv64v2(fd, parts, count, offset, 0); }

int fsync(int fd) { return hit_fd(SYNC, "fsync", fd, 0, 0) ? failing() : REAL(fsync)(fd); }

int fdatasync(int fd) { return hit_fd(SYNC, "fdatasync", fd, 0, 0) ? failing() : REAL(fdatasync)(fd); }

int ftruncate64(int fd, off64_t size) { return hit_fd(ALLOCATE, "ftruncate", fd, 0, 0) ? failing() : REAL(ftruncate64)(fd, size); }

int truncate64(const char *path, off64_t size) {
    return hit_at(ALLOCATE, "truncate", AT_FDCWD, path) ? failing() : REAL(truncate64)(path, size);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t size) {
    return hit_fd(ALLOCATE, "fallocate", fd, 0, 0) ? failing() : REAL(fallocate64)(fd, mode, offset, size);
}

int fallocate(int fd, int mode, off_t offset, off_t size) { return fallocate64(fd, mode, offset, size); }

int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    return hit_fd(ALLOCATE, "posix_fallocate", fd, 0, 0) ? shared->error : REAL(posix_fallocate64)(fd, offset, size);
}

/* -- names */

int openat64(int directory, const char *name, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return flags & O_CREAT && hit_at(CREATE, "open", directory, name) ? failing() : REAL(openat64)(directory, name, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return openat64(AT_FDCWD, path, flags, mode);
}

int open(const char *path, int flags, ...) __attribute__((alias("open64")));
int openat(int directory, const char *name, int flags, ...) __attribute__((alias("openat64")));

int mkdirat(int directory, const char *name, mode_t mode) {
    return hit_at(CREATE, "mkdir", directory, name) ? failing() : REAL(mkdirat)(directory, name, mode);
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int symlinkat(const char *target, int directory, const char *name) {
    return hit_at(CREATE, "symlink", directory, name) ? failing() : REAL(symlinkat)(target, directory, name);
}

int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

int linkat(int from, const char *old, int to, const char *name, int flags) {
    return hit_at(NAME, "link", to, name) ? failing() : REAL(linkat)(from, old, to, name, flags);
}

int link(const char *old, const char *path) { return linkat(AT_FDCWD, old, AT_FDCWD, path, 0); }

int renameat(int from, const char *old, int to, const char *name) {
    return hit_at(NAME, "rename", to, name) ? failing() : REAL(renameat)(from, old, to, name);
}

int rename(const char *old, const char *path) { return renameat(AT_FDCWD, old, AT_FDCWD, path); }

int unlinkat(int directory, const char *name, int flags) {
    return hit_at(REMOVE, flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, name) ? failing() : REAL(unlinkat)(directory, name, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }

int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int fchmod(int fd, mode_t mode) { return hit_fd(MARK, "fchmod", fd, 0, 0) ? failing() : REAL(fchmod)(fd, mode); }

int fchmodat(int directory, const char *name, mode_t mode, int flags) {
    return hit_at(MARK, "chmod", directory, name) ? failing() : REAL(fchmodat)(directory, name, mode, flags);
}

int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }

int utimensat(int directory, const char *name, const struct timespec times[2], int flags) {
    return hit_at(MARK, "utime", directory, name) ? failing() : REAL(utimensat)(directory, name, times, flags);
}

int futimens(int fd, const struct timespec times[2]) { return hit_fd(MARK, "utime", fd, 0, 0) ? failing() : REAL(futimens)(fd, times); }

int fstatat64(int directory, const char *name, struct stat64 *facts, int flags) {
    return hit_at(LOOK, "stat", directory, name) ? failing() : REAL(fstatat64)(directory, name, facts, flags);
}

int stat64(const char *path, struct stat64 *facts) { return fstatat64(AT_FDCWD, path, facts, 0); }

int lstat64(const char *path, struct stat64 *facts) { return fstatat64(AT_FDCWD, path, facts, AT_SYMLINK_NOFOLLOW); }
