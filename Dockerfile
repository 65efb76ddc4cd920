# syntax=docker/dockerfile:1
# TensorRT-LLM with what AWS's EFA network needs: libfabric, aws-ofi-nccl, GDRCopy. NCCL, Open MPI
# and torch stay the base image's own, the versions TensorRT-LLM was built and tested with.
# One image for both worlds: on a machine without EFA nothing of EFA is switched on (see 90-efa.sh).
ARG TRTLLM_VERSION=1.1.0

# ---- GDRCopy: built in a stage of its own, so that no build tool is added to, or purged from, the
# ---- image itself (Triton compiles at run time: a `purge gcc` would take its compiler away)
FROM nvcr.io/nvidia/tensorrt-llm/release:${TRTLLM_VERSION} AS gdrcopy
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG GDRCOPY_VERSION=2.5.1
ARG GDRCOPY_SHA256=c6d5ebb7dabb89d798f27609511735595004da73af28d93ac041bb5290c4cbec
# The compiler is not pinned: any will do, and it stays behind in this stage.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev make \
 && rm -rf /var/lib/apt/lists/*
# `lib` only: the kernel module is the host's, and its device /dev/gdrdrv is passed by `docker run`.
RUN curl --fail --silent --show-error --location --retry 5 --output /tmp/gdrcopy.tar.gz \
        "https://github.com/NVIDIA/gdrcopy/archive/refs/tags/v${GDRCOPY_VERSION}.tar.gz" \
 && echo "${GDRCOPY_SHA256}  /tmp/gdrcopy.tar.gz" | sha256sum --check --strict \
 && tar --extract --file /tmp/gdrcopy.tar.gz --directory /tmp \
 && make -C "/tmp/gdrcopy-${GDRCOPY_VERSION}" CUDA=/usr/local/cuda prefix=/opt/gdrcopy lib lib_install \
 && test -e /opt/gdrcopy/lib/libgdrapi.so.2

# ---- the image
FROM nvcr.io/nvidia/tensorrt-llm/release:${TRTLLM_VERSION}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

COPY --from=gdrcopy /opt/gdrcopy /opt/gdrcopy

# To use another version give its checksum too: AWS publishes both. 1.49.0 is the first with
# --enable-ngc, which knows that it is in an NVIDIA container (no kernel module, no limits, no device
# check, the plugin built for these images).
ARG DEBIAN_FRONTEND=noninteractive
ARG EFA_VERSION=1.49.0
ARG EFA_SHA256=cf2e9281a2328a243c76f911a490faed43ca0fecfe4733c25e34b2e92a32c309
# * An older libfabric or plugin of the base goes first: the installer's packages own the same files
#   and it stops at a stale aws-ofi-nccl.conf.
# * --skip-mpi: the engine and mpi4py are linked against the base's Open MPI in /opt/hpcx; a second
#   mpirun could only be the wrong one.
# * libnccl-net.so is the name that NCCL loads without being asked. Neither the EFA plugin (it has
#   been seen to crash TensorRT-LLM where there is no EFA device) nor HPC-X's may have it; without
#   one NCCL uses its own InfiniBand and socket transports. The rest of /opt/hpcx stays: torch and
#   MPI need it.
# * /etc/nccl.conf would select the plugin everywhere; 90-efa.sh does where it works.
# * ld.so.conf.d, not LD_LIBRARY_PATH: the base may leave that one empty and set it in shells only.
# * The last lines: a plugin that cannot be loaded means TCP speed without any error, so fail here.
RUN curl --fail --silent --show-error --location --retry 5 --output /tmp/efa.tar.gz \
        "https://efa-installer.amazonaws.com/aws-efa-installer-${EFA_VERSION}.tar.gz" \
 && echo "${EFA_SHA256}  /tmp/efa.tar.gz" | sha256sum --check --strict \
 && tar --extract --file /tmp/efa.tar.gz --directory /tmp \
 && apt-get update \
 && dpkg-query --show --showformat="\${db:Status-Abbrev} \${Package}\n" \
        | awk '/^ii +(libfabric.*aws|libnccl-ofi)/ {print $2}' \
        | xargs --no-run-if-empty apt-get purge --yes --allow-change-held-packages \
 && rm -rf /opt/amazon/efa /opt/amazon/ofi-nccl /opt/amazon/aws-ofi-nccl \
        /etc/ld.so.conf.d/aws-ofi-nccl.conf /opt/hpcx/nccl_rdma_sharp_plugin \
 && env --chdir=/tmp/aws-efa-installer ./efa_installer.sh -y --enable-ngc --skip-mpi \
 && rm -rf /tmp/efa.tar.gz /tmp/aws-efa-installer /var/lib/apt/lists/* \
 && find /opt/amazon -name libnccl-net.so -delete \
 && if [ -f /etc/nccl.conf ]; then sed --in-place '/^NCCL_NET_PLUGIN/d' /etc/nccl.conf; fi \
 && plugin="$(find /opt/amazon -name libnccl-net-ofi.so -print -quit)" \
 && printf '%s\n' /opt/amazon/efa/lib "$(dirname "${plugin}")" /opt/gdrcopy/lib \
        > /etc/ld.so.conf.d/000-efa.conf \
 && ldconfig \
 && test -s "${plugin}" \
 && /opt/amazon/efa/bin/fi_info --version \
 && if ldd "${plugin}" | grep 'not found' | grep --invert-match 'libcuda\.so'; then exit 1; fi \
 && grep --quiet entrypoint.d /opt/nvidia/nvidia_entrypoint.sh

# Sourced by the base's entrypoint before the command. `docker exec` does not pass there: prefix its
# command with /opt/nvidia/nvidia_entrypoint.sh, or give it these variables with -e.
# 0x1d0f is Amazon: other RDMA cards have uverbs devices as well, and are NCCL's own business.
COPY <<'EOT' /opt/nvidia/entrypoint.d/90-efa.sh
if grep -qs 0x1d0f /sys/class/infiniband/*/device/vendor \
        && compgen -G '/dev/infiniband/uverbs*' > /dev/null; then
    # NCCL makes libnccl-net-ofi.so of it. Some base images say aws-ofi, the library's former name.
    # It is NCCL's tuner, too, and names itself as that.
    case "${NCCL_NET_PLUGIN:-}" in '' | aws-ofi) export NCCL_NET_PLUGIN=ofi ;; esac
    export FI_PROVIDER="${FI_PROVIDER:-efa}"
    # MPI's few messages go over TCP, as in AWS's own images: not over UCX, which takes an EFA device
    # for InfiniBand, nor over bridges that only one host has. Open MPI allows an include or an exclude.
    export OMPI_MCA_pml="${OMPI_MCA_pml:-^ucx}"
    [ "${OMPI_MCA_btl_tcp_if_include:-}" ] \
        || export OMPI_MCA_btl_tcp_if_exclude="${OMPI_MCA_btl_tcp_if_exclude:-lo,docker0,veth_def_agent}"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^docker,lo,veth}"
else
    # No EFA here, or its devices were not passed in: the plugin would find no provider.
    case "${NCCL_NET_PLUGIN:-}" in ofi | aws-ofi) unset NCCL_NET_PLUGIN ;; esac
fi
EOT

# Right everywhere. FI_EFA_USE_HUGE_PAGE: with huge pages a fork can fail for want of memory.
# PMIX_MCA_gds: PMIx's shared-memory store does not work across containers, and complains.
# PATH: for fi_info, at the end so that it hides nothing of the base.
ENV FI_EFA_USE_HUGE_PAGE=0 \
    PMIX_MCA_gds=hash \
    PATH="${PATH}:/opt/amazon/efa/bin"

# An ARG from before FROM is out of scope after it, until it is named again. Last, because what
# changes it changes nothing above.
ARG TRTLLM_VERSION
LABEL org.opencontainers.image.title="tensorrt-llm-serve" \
      org.opencontainers.image.description="TensorRT-LLM with EFA, aws-ofi-nccl and GDRCopy" \
      org.opencontainers.image.version="${TRTLLM_VERSION}" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/tensorrt-llm/release:${TRTLLM_VERSION}"
