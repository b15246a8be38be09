"""Tools that turn a checkpoint into graphs and engines, and prove them right. Serving never imports this package."""
