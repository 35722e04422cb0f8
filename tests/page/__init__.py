"""The page for people in a real browser, and the bridge that leads a browser to a Unix socket."""
