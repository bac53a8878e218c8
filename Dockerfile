# lorakit's front end for one NVIDIA card, behind a password; docs/hosts.md has the commands.
# CUDA 13 runs on Turing (GTX 16, RTX 20) and newer, with driver 580 or newer. torch brings its own CUDA libraries.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# A compiler is for torch.compile alone.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /lorakit
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lorakit ./lorakit
COPY presets ./presets
RUN python3 -m venv venv && venv/bin/pip install --no-cache-dir -c constraints.txt ".[ui]"

# Photos, runs and fetched models are in the volume, whoever the container runs as.
ENV PATH=/lorakit/venv/bin:$PATH \
    HOME=/workspace \
    HF_HOME=/workspace/huggingface
VOLUME /workspace
WORKDIR /workspace
EXPOSE 7860

# Without LORAKIT_PASSWORD in the environment it refuses to start: this address is open to others.
CMD ["lorakit", "ui", "--host", "0.0.0.0", "--port", "7860", "--runs", "/workspace/runs", "--root", "/workspace"]
