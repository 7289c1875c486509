# Images: `gateway` (no torch, faces clients), `worker` (torch, faces gateways only), `proxy` (HAProxy, for several gateways).
#   docker build --target gateway -t degas-gateway .
#   docker build --target worker -t degas-worker .                              # CPU
#   docker build --target worker -t degas-worker:cuda \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .          # NVIDIA
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS source
WORKDIR /source
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/degas
ENV PATH=/opt/degas/bin:$PATH
COPY pyproject.toml constraints.txt ./
# What an extra needs, by itself: this layer stays when only the source has changed.
RUN printf '%s\n' 'import sys, tomllib' \
      'project = tomllib.load(open("pyproject.toml", "rb"))["project"]' \
      'print(*project["dependencies"], *project["optional-dependencies"][sys.argv[1]], sep="\n")' > needs.py \
 && for extra in gateway worker; do python needs.py $extra > $extra.txt; done

FROM source AS gateway-needs
RUN pip install -c constraints.txt -r gateway.txt

FROM gateway-needs AS gateway-build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY setup.py README.md LICENSE ./
COPY shared shared
COPY gateway gateway
COPY worker worker
COPY pocket pocket
COPY loadtest loadtest
COPY degas degas
RUN pip install --no-deps .
# The gateway's image must not hold torch: it would be 200 MB to 5 GB of what it never imports.
RUN python -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
# The loop that writes tokens: the image that runs has no compiler.
RUN cd / && python -m degas.rooms gateway.native.library
RUN mkdir /package && cd /opt/degas && cp -a --parents bin/degas lib/python*/site-packages/degas* /package

# The CPU's decode operations for every kind of x86-64 or 64-bit Arm processor: the image that runs has no compiler. They are
# compiled anew only when their own source has changed, beside the installing of torch. KINDS names some of them, such as
# "avx512bf16 avx2", where it is known what the image will run on.
FROM source AS operations
RUN apt-get update && apt-get install -y --no-install-recommends g++
RUN pip install -c constraints.txt structlog
WORKDIR /operations
COPY worker/native/build.py worker/native/*.cpp worker/native/*.h worker/native/
ARG KINDS=""
RUN mkdir libraries \
 && case "$(uname -m)" in x86_64|aarch64) python -m worker.native.build ${KINDS} && mv worker/native/*.so libraries;; esac

FROM source AS worker-needs
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=torch==2.13.0
# An empty TORCH_INDEX is pip's default index.
RUN pip install ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} ${TORCH}
RUN pip install -c constraints.txt -r worker.txt

FROM worker-needs AS worker-build
COPY setup.py README.md LICENSE ./
COPY shared shared
COPY gateway gateway
COPY worker worker
COPY pocket pocket
COPY loadtest loadtest
COPY degas degas
RUN pip install --no-deps .
COPY --from=operations /operations/libraries /operations
RUN cd / && cp -r /operations/. "$(python -c 'import degas, worker.native; print(*worker.native.__path__)')"
RUN mkdir /package && cd /opt/degas && cp -a --parents bin/degas lib/python*/site-packages/degas* /package

FROM python:${PYTHON}-slim-bookworm AS runtime
RUN groupadd --system --gid 10001 degas \
 && useradd --system --uid 10001 --gid degas --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin degas \
 # A named volume takes the owner of the folder it is first mounted on.
 && install -d -m 0700 -o degas -g degas /keys /keys/worker /keys/gateway /run/degas
ENV PATH=/opt/degas/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp

# What others made is a layer of its own below Degas: a new version of Degas alone is a few megabytes to build, push and pull.
FROM runtime AS gateway
COPY --from=gateway-needs /opt/degas /opt/degas
COPY --from=gateway-build /package /opt/degas
ENV DEGAS_GATEWAY_HOST=0.0.0.0 DEGAS_GATEWAY_PORT=8080
EXPOSE 8080 8081
HEALTHCHECK --interval=5s --timeout=4s --start-period=20s --retries=3 \
  CMD ["python", "-m", "degas.health", "http", "http://127.0.0.1:8080/healthz"]
CMD ["python", "-m", "degas.rooms", "gateway"]

FROM runtime AS worker
COPY --from=worker-needs /opt/degas /opt/degas
COPY --from=worker-build /package /opt/degas
EXPOSE 5555
# The supervisor runs here too: a decode loop that hangs is killed and replaced inside the container, because no
# container engine restarts one for being unhealthy.
HEALTHCHECK --interval=5s --timeout=4s --start-period=300s --retries=3 \
  CMD ["python", "-m", "degas.health", "file", "/run/degas/status.json"]
CMD ["python", "-m", "degas", "serve", "--only", "worker", "--status-file", "/run/degas/status.json"]

FROM python:${PYTHON}-slim-bookworm AS proxy
RUN apt-get update && apt-get install -y --no-install-recommends haproxy && rm -rf /var/lib/apt/lists/*
COPY deploy/proxy/haproxy.cfg /etc/haproxy/haproxy.cfg
USER haproxy
EXPOSE 8080 8081
CMD ["haproxy", "-W", "-db", "-f", "/etc/haproxy/haproxy.cfg"]
