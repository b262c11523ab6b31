# CPU image:   docker build -t nanovllm .
# CUDA image:  docker build -t nanovllm --build-arg BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
# Run:         docker run --rm nanovllm generate "Once upon a time"
# Serve:       docker run --rm -p 8000:8000 -e NANOVLLM_API_KEY=... nanovllm serve --host 0.0.0.0
#
# TORCH_INDEX names another package index to look for torch in, such as one with CPU-only builds.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX=""
RUN command -v python3 > /dev/null && python3 -c "import ensurepip" \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv)
RUN python3 -m venv /opt/nanovllm
WORKDIR /src
COPY . .
RUN /opt/nanovllm/bin/pip install --no-cache-dir \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt .

# The compiler is for the CPU kernels, which are compiled at first use.
FROM ${BASE_IMAGE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
        $(command -v python3 > /dev/null || echo python3) \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home nanovllm
COPY --from=build /opt/nanovllm /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH \
    PYTHONUNBUFFERED=1
EXPOSE 8000
USER 10001
WORKDIR /home/nanovllm
ENTRYPOINT ["nanovllm"]
CMD ["doctor"]
