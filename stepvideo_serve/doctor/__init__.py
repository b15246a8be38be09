"""What a server needs of its machine and files, looked at before a start: nothing is started, nothing is changed."""
