"""Programs for python -m that make a release: its version, its wheels, the licences of what it depends on."""
