"""A toy world, a tiny checkpoint trained on it, and what that says about quality."""
