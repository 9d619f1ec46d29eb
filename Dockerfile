# The control plane, and the agent for trying out: `docker build -t flux .`, then `docker compose up` (compose.yaml).
# BASE is an argument for those whose builds may not reach Docker Hub; any Debian 12 or newer will do.
ARG BASE=docker.io/library/debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends binutils ca-certificates python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# The packages first: they change less often than the sources.
COPY scripts/setup scripts/
COPY requirements/build.txt requirements/
ENV FLUX_VENV=/venv PYTHON=/usr/bin/python3 PYTHONHASHSEED=0
RUN scripts/setup build
COPY flux.py flux_agent.py flux.spec example.flux.yaml ./
COPY fluxlib fluxlib
COPY debian/third_party.py debian/
RUN /venv/bin/python -m PyInstaller --noconfirm --log-level WARN flux.spec \
    && /venv/bin/python debian/third_party.py dist/flux >third-party.txt

FROM ${BASE}
# What the frozen programs take from the system (see flux.spec), and curl for the health check.
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends ca-certificates curl libexpat1 libgcc-s1 libstdc++6 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 7227 flux \
    && useradd --uid 7227 --gid 7227 --home-dir /var/lib/flux --shell /usr/sbin/nologin flux \
    && install -d -m 0700 -o flux -g flux /etc/flux /etc/flux/certs /var/lib/flux /var/lib/flux-agent \
    && ln -s ../lib/flux/flux /usr/bin/flux
COPY --from=build /src/dist/flux /usr/lib/flux
COPY --from=build /src/third-party.txt /src/example.flux.yaml /usr/share/doc/flux/
COPY LICENSE /usr/share/doc/flux/
USER 7227:7227
# Without a flux.yaml the first start makes one here, with a key of its own, and says so.
WORKDIR /etc/flux
VOLUME /etc/flux /var/lib/flux
EXPOSE 7227
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:7227/health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["flux"]
CMD ["serve"]
