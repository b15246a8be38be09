# The gateway's image (docs/gateway.md, "Deployment"): no GPU, no weights. Jobs and videos lie under /data.
#
#   docker build -f docker/gateway.Dockerfile -t stepvideo-gateway .
#   docker run --rm --read-only --tmpfs /tmp:size=1g --publish 127.0.0.1:8010:8010 -v stepvideo-gateway:/data \
#       -v ./docker/gateway.toml:/etc/stepvideo/gateway.toml:ro stepvideo-gateway
# --build-arg PYTHON=python@sha256:... builds on exactly one image, whatever its tag becomes (docs/operations.md, "Exactly
# this image").
ARG PYTHON=python:3.12.13-slim-trixie

FROM ${PYTHON} AS packages
WORKDIR /src
COPY client ./client
COPY gateway ./gateway
# The versions stand in the two pyproject.toml.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir --target /packages ./client ./gateway

FROM ${PYTHON}
LABEL org.opencontainers.image.title="stepvideo-gateway" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=packages /packages /opt/stepvideo/packages
COPY docker/gateway.toml /etc/stepvideo/gateway.toml
ENV PYTHONPATH=/opt/stepvideo/packages PYTHONDONTWRITEBYTECODE=1
RUN groupadd --gid 10001 stepvideo \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin stepvideo \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8010
# Well: the database answers, and some server is ready, which takes minutes where both start together.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60m --retries=4 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8010/health', timeout=8)"]
ENTRYPOINT ["python", "-m", "stepvideo_gateway", "--config", "/etc/stepvideo/gateway.toml"]
