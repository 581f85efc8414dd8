# The server in a box: `docker build -t likeness . && docker run --rm -p 8000:8000 likeness` answers at http://localhost:8000/docs.
# LoRAs outlive it on a volume: -v likeness-store:/likeness/out/store.
# The default index gives torch's CUDA build; for a small CPU image:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t likeness .
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL=
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

RUN apt-get update -qq \
    && apt-get install -qq -y --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home likeness

WORKDIR /likeness
COPY --chown=likeness . .
RUN chown likeness /likeness
USER likeness
RUN make install && mkdir -p out/store

EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=120s --timeout=5s \
    CMD [".venv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD [".venv/bin/likeness", "serve", "--host", "0.0.0.0"]
