# syntax=docker/dockerfile:1
# bilevel_fast for NVIDIA GPUs, CUDA 13. Not built where it is written: docs/install.md says what was looked at.
#
#   docker build --build-arg VERSION=0.1.0 -t bilevel-fast .
#   docker run --rm --gpus all bilevel-fast                                     says what runs here
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" bilevel-fast bilevel-fast train --out runs/mini

ARG CUDA=13.0.2
ARG UBUNTU=24.04

# The wheel, with the kernels that only nvcc compiles.
FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS wheel
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir "build>=1.2"
COPY . /source
WORKDIR /source
# Of git nothing is copied (.dockerignore): without VERSION it is the fallback of pyproject.toml.
ARG VERSION
ENV PIP_CONSTRAINT=/source/constraints.txt
RUN if [ -n "$VERSION" ]; then export SETUPTOOLS_SCM_PRETEND_VERSION="$VERSION"; fi \
 && /build/bin/python -m build --wheel --outdir /wheels

# torch's wheels bring CUDA's libraries; the driver is the host's. g++ and python3-dev: Triton compiles its launchers.
FROM nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 bilevel \
 && install --directory --owner bilevel /work
ENV PATH=/opt/venv/bin:$PATH
COPY constraints.txt /tmp/constraints.txt
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    python3 -m venv /opt/venv \
 && wheel=$(ls /wheels/*.whl) \
 && pip install --no-cache-dir --constraint /tmp/constraints.txt "bilevel-fast[sd,lora,data,metrics] @ file://$wheel"
USER bilevel
WORKDIR /work
CMD ["bilevel-fast", "doctor"]
