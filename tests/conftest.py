"""What every test may use. Being here puts the checkout on the path, so that `tests.support` can be imported."""
