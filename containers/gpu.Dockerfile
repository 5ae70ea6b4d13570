# mmscale on NVIDIA GPUs, in NVIDIA's PyTorch image, which brings torch, CUDA, NCCL and Transformer-Engine.
#   docker build -f containers/gpu.Dockerfile -t mmscale-gpu .
#   enroot import -o mmscale.sqsh dockerd://mmscale-gpu
# Another image:  --build-arg BASE=nvcr.io/nvidia/pytorch:YY.MM-py3. The build ends if its versions do not fit pyproject.toml.
ARG BASE=nvcr.io/nvidia/pytorch:25.11-py3
# hadolint ignore=DL3006
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY containers/requirements.py containers/
# The image's own torch and what was built against it stay: they are neither installed nor pinned.
RUN python3 containers/requirements.py --check torch transformer-engine \
    && python3 containers/requirements.py hf,data --without torch numpy transformer-engine > /tmp/requirements.txt \
    && python3 containers/requirements.py --constraints --without torch numpy triton nvidia > /tmp/constraints.txt \
    && python3 -m pip install --no-deps -c /tmp/constraints.txt megatron-core \
    && grep -v '^megatron-core' /tmp/requirements.txt > /tmp/others.txt \
    && python3 -m pip install -c /tmp/constraints.txt -r /tmp/others.txt

COPY . .
RUN python3 -m pip install --no-deps .
