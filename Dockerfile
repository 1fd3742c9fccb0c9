# The scripts and all that they need. For a CPU:
#
#     docker build -t minimal-rl4lms .
#
# For GPUs, with torch's build for a version of CUDA (https://pytorch.org/get-started/locally/ has the list):
#
#     docker build -t minimal-rl4lms --build-arg TORCH=cu130 .
#
# CUDA itself is in that build; the host needs a driver for it and the NVIDIA container toolkit. Runs, and what is
# fetched from the hub, stay on the host in two folders:
#
#     docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/app/runs" -v "$HOME/.cache/huggingface:/hf" \
#         minimal-rl4lms torchrun --nproc_per_node 4 nlpo_seq2seq.py --task cnn_dm --reward rouge1 --dtype bfloat16
#
# With --user "$(id -u):$(id -g)" they are yours instead of root's. Without a command it runs the tests.

FROM python:3.12-slim-bookworm

# cpu, or a version of CUDA (cu126, cu130): a folder of https://download.pytorch.org/whl/
ARG TORCH=cpu

# WordNet for METEOR, so that NLTK's server is not needed; git for a test; g++ for packages without a wheel
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git wordnet-base wordnet-sense-index \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# torch by itself and first: it is the largest layer and changes least
COPY requirements.txt ./
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/$TORCH" \
    "$(grep -o '^torch==[0-9.]*' requirements.txt)"
RUN pip install --no-cache-dir -r requirements.txt

# NLTK's data, and folders that any --user may write to
ENV NLTK_DATA=/opt/nltk_data HF_HOME=/hf HOME=/tmp PYTHONUNBUFFERED=1
COPY tests/make_nltk_data.py tests/
RUN python tests/make_nltk_data.py "$NLTK_DATA" && mkdir -p /hf runs && chmod 777 /app /hf runs

COPY *.py *.md LICENSE CITATION.cff ruff.toml ./
COPY benchmarks benchmarks/
COPY docs docs/
COPY tests tests/

CMD ["python", "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "tests"]
