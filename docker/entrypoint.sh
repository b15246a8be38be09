#!/bin/sh
# Starts the server of this image. Arguments go to python -m stepvideo_serve serve, or to the supervisor.
#   STEPVIDEO_CONFIG     the configuration                       /etc/stepvideo/serve.toml
#   STEPVIDEO_ADDRESS    the address to listen on                127.0.0.1: reachable from inside the container only
#   STEPVIDEO_SUPERVISE  1: with `stepvideo_serve supervise`, for where nothing else restarts what is unhealthy      0
#   STEPVIDEO_PYTHON     the interpreter                         python3
set -eu
config=${STEPVIDEO_CONFIG:-/etc/stepvideo/serve.toml}
if [ ! -r "$config" ]; then
    echo "error: The configuration must be readable, but there is nothing to read at $config: mount it, or set STEPVIDEO_CONFIG." >&2
    exit 1
fi
set -- --config "$config" --address "${STEPVIDEO_ADDRESS:-127.0.0.1}" "$@"
case ${STEPVIDEO_SUPERVISE:-0} in
    0) exec "${STEPVIDEO_PYTHON:-python3}" -m stepvideo_serve serve "$@" ;;
    1) exec "${STEPVIDEO_PYTHON:-python3}" -m stepvideo_serve supervise "$@" ;;
    *) echo "error: STEPVIDEO_SUPERVISE must be 0 or 1, got $STEPVIDEO_SUPERVISE: correct it." >&2; exit 1 ;;
esac
