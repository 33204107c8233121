# The server, or any verb, in a container. DEVICE is cpu, cuda or tpu:
#
#   docker build --build-arg DEVICE=cuda -t easyanimate_jax .
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v /my/model:/model -v /my/served:/data easyanimate_jax
#   docker run ... easyanimate_jax train configs/demo.py
#
# The host gives the GPU's driver; the wheels bring CUDA. No weights are in the image.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE}
ARG DEVICE=cpu

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HOME=/cache JAX_COMPILATION_CACHE_DIR=/cache/jax
WORKDIR /app
COPY requirements.lock setup.py pyproject.toml ./
COPY easyanimate_jax easyanimate_jax
COPY configs configs
COPY train.py sample.py ./
# The releases of the lock file; its hashes would refuse the packages that only DEVICE needs. Users
# who are given by --user may write to the last three folders, too.
RUN sed -e '/--hash/d' -e 's/ \\$//' requirements.lock > /tmp/constraints.txt \
    && extras="serve$([ "$DEVICE" = cpu ] || echo ",$DEVICE")" \
    && python3 -m venv /venv \
    && /venv/bin/pip install --constraint /tmp/constraints.txt --editable ".[$extras]" \
    && /venv/bin/python -m compileall -q easyanimate_jax \
    && rm /tmp/constraints.txt \
    && mkdir -p /data /cache runs && chown 1000:1000 /data /cache runs && chmod 1777 /data /cache runs
ENV PATH=/venv/bin:$PATH

USER 1000
VOLUME /data /cache
EXPOSE 8000
# A model of 12B is read for minutes before the server is ready.
HEALTHCHECK --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz')"]
ENTRYPOINT ["python", "-m", "easyanimate_jax"]
CMD ["serve", "/model", "--folder", "/data", "--host", "0.0.0.0"]
