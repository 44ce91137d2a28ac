# The project with its packages, for NVIDIA's GPUs (driver 580 or later) or, to try it, for any CPU:
#
#   docker build -t lora .
#   docker build -t lora-cpu --build-arg BASE_IMAGE=ubuntu:24.04 .
#
# Pictures, results and the hub's downloads stay in folders of yours, made before, so that they are yours:
#
#   mkdir -p output hub
#   docker run --rm --init --gpus all --ipc host -v ./my_pictures:/pictures -v ./output:/output -v ./hub:/hub \
#     lora -m BASE -d /pictures --trigger_word sks -o /output/my_lora
#
# It is the wrapper run_lora_train.sh. `--entrypoint bash` starts others: lora run_lora_infer.sh /output/my_lora
ARG BASE_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG UV_IMAGE=ghcr.io/astral-sh/uv:0.13.9
FROM ${UV_IMAGE} AS uv
FROM ${BASE_IMAGE}

# A compiler and Python's headers: --compile makes kernels while it runs
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=uv /uv /usr/local/bin/uv

# On an image of NVIDIA's, all packages as in uv.lock, whose torch brings CUDA's libraries along. Else the build
# of torch that TORCH_BACKEND names (cpu, or another of uv's --torch-backend), and the pins of requirements.txt.
ARG TORCH_BACKEND=cpu
ENV UV_PROJECT_ENVIRONMENT=/opt/venv UV_PYTHON=/usr/bin/python3 UV_PYTHON_DOWNLOADS=never \
    UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
WORKDIR /app
COPY pyproject.toml uv.lock requirements.txt ./
RUN if [ -n "$CUDA_VERSION" ]; then uv sync --frozen --no-install-project --no-cache; \
    else uv venv /opt/venv \
        && uv pip install --python /opt/venv --torch-backend "$TORCH_BACKEND" --no-cache -r requirements.txt; \
    fi
COPY . .

# Not root, and with the number of the first user of most machines, whose folders it may then write to
ARG USER_ID=1000
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid "$USER_ID" trainer \
    && install -d -o trainer /pictures /output /hub \
    && ln -s /output /app/output
USER ${USER_ID}
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH HF_HOME=/hub PYTHONUNBUFFERED=1
VOLUME ["/pictures", "/output", "/hub"]
ENTRYPOINT ["bash", "run_lora_train.sh"]
CMD ["--help"]
