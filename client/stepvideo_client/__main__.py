"""`python -m stepvideo_client`."""

from stepvideo_client.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
