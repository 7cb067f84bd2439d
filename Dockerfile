# Build: docker build -t maskserve .        Run: docker run --rm --user $(id -u) -v "$PWD":/work maskserve reduce ...
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/maskserve
# The CPU build of torch; for a GPU image drop the index and start from a CUDA base image.
RUN /opt/maskserve/bin/pip install --no-cache-dir 'torch>=2.9,<2.14' --index-url https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY native native
COPY maskserve maskserve
COPY cli cli
COPY api api
RUN /opt/maskserve/bin/pip install --no-cache-dir .

FROM python:3.11-slim-bookworm
COPY --from=build /opt/maskserve /opt/maskserve
# Any uid works, also one without a passwd entry; only /tmp and the mounted folder are written to.
ENV PATH=/opt/maskserve/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
WORKDIR /work
USER 65532:65532
EXPOSE 8000
ENTRYPOINT ["maskserve"]
CMD ["--help"]
