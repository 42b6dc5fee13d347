"""Commands of this repository. A package, so that the tests can import them."""
