"""What will a request take? Layouts and memory before a purchase, pace and quotes on a running server."""
