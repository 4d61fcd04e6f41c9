# The image for jobs on a cluster: Python, the packages that the code was tested with, and the code itself.
# A job brings its own code along; the image is good as long as the packages that this code wants are in it.
#
#   docker build --tag rslp . && beaker image create --name rslp rslp
#
# The default base has no CUDA libraries of its own: PyTorch's wheels bring theirs, the host brings the driver.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# rasterio, shapely and torch are wheels; git is for people who look around in a job.
RUN apt-get update -qq \
    && apt-get install -qq -y --no-install-recommends git libexpat1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rslp
# The packages first: a change of code alone then rebuilds in seconds.
COPY .ci/install .ci/install
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
RUN mkdir -p rslp data/helios && touch rslp/__init__.py data/helios/__init__.py \
    && PIP_NO_CACHE_DIR=1 .ci/install "$(command -v python)" beaker,gs,s3,points,tensorboard,wandb,mlflow

COPY . .

# Where the original's image started, so that commands written for it work here.
CMD ["python", "-m", "rslp.main", "--help"]
