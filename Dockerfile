# The project with its packages, for NVIDIA's GPUs (driver 580 or later) or, to try it, for any CPU:
#
#   docker build -t lora .
#   docker build -t lora-cpu --build-arg BASE=ubuntu:24.04 --build-arg TORCH_BACKEND=cpu .
#
# Pictures, results and the hub's downloads stay in folders of yours (made before, so that they are yours):
#
#   mkdir -p pictures output cache
#   docker run --rm --init --gpus all --ipc host -v ./pictures:/app/pictures -v ./output:/app/output \
#     -v ./cache:/cache lora bash run_lora_train.sh -m BASE -d pictures --trigger_word sks -o output/my_lora
ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG UV=ghcr.io/astral-sh/uv:0.13.9
FROM ${UV} AS uv
FROM ${BASE}

# A compiler and Python's headers: --compile makes kernels while it runs
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=uv /uv /usr/local/bin/uv

# torch brings CUDA's libraries along. `locked`: all packages as in uv.lock. Any other name, such as cpu, cu128
# or rocm6.4, takes that build of torch, and of the other packages the pins of requirements.txt.
ARG TORCH_BACKEND=locked
ENV UV_PROJECT_ENVIRONMENT=/opt/venv UV_PYTHON=/usr/bin/python3 UV_PYTHON_DOWNLOADS=never \
    UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
WORKDIR /app
COPY pyproject.toml uv.lock requirements.txt ./
RUN if [ "$TORCH_BACKEND" = locked ]; then uv sync --frozen --no-install-project --no-cache; \
    else uv venv /opt/venv \
        && uv pip install --python /opt/venv --torch-backend "$TORCH_BACKEND" --no-cache -r requirements.txt; \
    fi
COPY . .

# Not root, and with the number of the first user of most machines, whose folders it may then write to
ARG USER_ID=1000
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid "$USER_ID" trainer \
    && install -d -o trainer /app/pictures /app/output /cache \
    && chown trainer /app
USER ${USER_ID}
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1
VOLUME ["/app/pictures", "/app/output", "/cache"]
CMD ["bash", "run_lora_train.sh", "--help"]
