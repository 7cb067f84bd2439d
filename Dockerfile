# docker build -t maskserve .
# docker run --rm --user "$(id -u)" -v "$PWD":/work maskserve reduce --op mean rain.safetensors -o mean.safetensors
#
# docs/containers.md says what the image promises, and how it runs on Kubernetes.

# A mirror's name, or a digest (python@sha256:...), goes in with --build-arg PYTHON_IMAGE=.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm

# -- what maskserve needs: a layer that a change of the sources leaves as it is
FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Byte code then goes by what a source holds, not by its time, which some builders rewrite: the root is read-only, and
# nothing could be compiled again but at every start.
ENV SOURCE_DATE_EPOCH=315532800
# No pip inside: pip --python installs from without.
RUN python -m venv --without-pip /opt/maskserve
WORKDIR /src
COPY pyproject.toml ./
# Formats that are not in the image by themselves: --build-arg EXTRAS=arrow,netcdf,geo.
ARG EXTRAS=
RUN python -c "import os, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [name for name in os.environ['EXTRAS'].split(',') if name]; \
print(*project['dependencies'], *(line for name in extras for line in project['optional-dependencies'][name]), sep='\n')" \
    > requirements.txt && grep '^torch' requirements.txt > torch.txt
# The CPU build of torch. For GPUs: --build-arg TORCH_INDEX=https://pypi.org/simple, whose torch brings CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip --python /opt/maskserve/bin/python install --index-url "${TORCH_INDEX}" -r torch.txt \
    # its tests and what compiles against it: 200 MB that nothing here runs
    && find /opt/maskserve/lib/python3.*/site-packages/torch \( -path '*/torch/test' -o -path '*/torch/include' \
         -o -path '*/torch/bin/*[Tt]est*' -o -path '*/torch/bin/protoc*' \) -prune -exec rm -r {} +
RUN pip --python /opt/maskserve/bin/python install -r requirements.txt

# -- maskserve itself, built by a compiler that stays here
FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml ./
RUN python -m venv /opt/build && python -c "import tomllib; \
print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], 'cmake', 'ninja', sep='\n')" \
    > requirements.txt && /opt/build/bin/pip install -r requirements.txt
ENV PATH=/opt/build/bin:$PATH
COPY CMakeLists.txt README.md LICENSE ./
COPY native native
# The kernels take minutes, so they are compiled before the Python sources are there, and again only when they change.
RUN mkdir -p maskserve cli/maskserve_cli api/maskserve_api \
    && pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/kernels . && rm -r /tmp/kernels
COPY maskserve maskserve
COPY cli cli
COPY api api
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheel .

# -- what is only maskserve, to lie over what it needs: two layers, of which a new version changes the small one
FROM dependencies AS installed
COPY --from=build /wheel /wheel
RUN pip --python /opt/maskserve/bin/python install --no-deps --no-index --prefix /installed /wheel/*.whl

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="maskserve" \
      org.opencontainers.image.description="Computes on tensors with missing values: command line, batch jobs and HTTP service" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=dependencies /opt/maskserve /opt/maskserve
COPY --from=installed /installed /opt/maskserve
# Any uid works, also one without a passwd entry; only /tmp and the mounted folder are written to, caches of compilers too.
ENV PATH=/opt/maskserve/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor TRITON_CACHE_DIR=/tmp/triton CUDA_CACHE_PATH=/tmp/cuda XDG_CACHE_HOME=/tmp/cache
WORKDIR /work
USER 65532:65532
EXPOSE 8000
STOPSIGNAL SIGTERM
# No HEALTHCHECK: jobs run in the same image, and /livez and /readyz are for whoever runs the service.
# Pid 1 is maskserve itself, without a shell before it: SIGTERM reaches it, and its exit code is the container's.
ENTRYPOINT ["maskserve"]
CMD ["--help"]
