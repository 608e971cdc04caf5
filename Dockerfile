# featprobe for CPUs. make image, then:  docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/space" featprobe demo
FROM python:3.12-slim

# The package index with PyTorch's builds for CPUs (see docs/start.md). Without one, the builds for CUDA come, 5 GB larger.
ARG INDEX=""

COPY . /src
RUN pip install --no-cache-dir ${INDEX:+--index-url "$INDEX"} torch torchvision \
    && pip install --no-cache-dir "/src[embedded,dicom,parquet]" \
    && rm -r /src

# The workspace: data, caches and heads lie in a folder of the host, and belong to its user.
WORKDIR /space
ENV HOME=/tmp
ENTRYPOINT ["featprobe"]
CMD ["--help"]
