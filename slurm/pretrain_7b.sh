#!/usr/bin/env bash
# Pretrain on a Slurm cluster, LLaMA 2 7B unless the arguments name another run.
#
#   sbatch slurm/pretrain_7b.sh 'data.sources=[{path: /data/corpus}]' train.run_dir=/data/runs/7b
#   sbatch --nodes=16 --time=48:00:00 slurm/pretrain_7b.sh optim.lr=1e-4 ...
#   NPROC_PER_NODE=4 sbatch --gpus-per-node=0 slurm/pretrain_7b.sh +exp=demo ...      # no GPUs
#
# Options of sbatch stand before the script and replace the defaults below; arguments after it are
# overrides, as for launch/train.py. Submitting the same line again continues the run.

#SBATCH --job-name=pretrain_7b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# An exclusive node gives all its cores, and only as much memory as was asked for: 0 asks for all of it.
#SBATCH --mem=0
#SBATCH --output=%x-%j.log
# After the failure of a node Slurm starts the job again, and the run resumes from its last checkpoint.
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time limit the ranks are asked to save and end (and torchrun below to wait for that).
#SBATCH --signal=TERM@120

set -euo pipefail

fail() {
  echo "pretrain_7b.sh: $1" >&2
  exit 2
}

[[ -n "${SLURM_JOB_ID:-}" ]] || fail "not inside a Slurm job: submit it with sbatch"

# sbatch runs a copy of this script from a spool folder, so its own place says nothing about the repository.
root=""
for folder in "${SLURM_SUBMIT_DIR:-.}" "${SLURM_SUBMIT_DIR:-.}/.." "$(dirname "${BASH_SOURCE[0]}")/.."; do
  if [[ -f "$folder/launch/train.py" ]]; then
    root=$(cd "$folder" && pwd)
    break
  fi
done
[[ -n "$root" ]] || fail "no launch/train.py in SLURM_SUBMIT_DIR (${SLURM_SUBMIT_DIR:-unset}): submit from the repository"
if [[ -d "$root/.venv/bin" ]]; then
  export PATH="$root/.venv/bin:$PATH"
fi

# What was asked for comes first: on an --exclusive node SLURM_GPUS_ON_NODE counts all GPUs here, while srun
# hands out as many as were asked for. A type may stand in front of the number (h100:8).
asked=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
ranks_per_node=${NPROC_PER_NODE:-${asked##*:}}
[[ "$ranks_per_node" =~ ^[1-9][0-9]*$ ]] ||
  fail "number of ranks a node is unknown (${ranks_per_node:-none}): ask for GPUs with --gpus-per-node=N, or set NPROC_PER_NODE"

overrides=(+exp=llama2_7b "$@")
for argument in "$@"; do
  if [[ "$argument" =~ ^\+{0,2}exp= ]]; then
    overrides=("$@")
  fi
done

# Bad input ends here, with exit code 2 and before any rank starts.
megallama check --world-size "$((SLURM_NNODES * ranks_per_node))" "${overrides[@]}"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
# A port of its own for each job, so that jobs may share nodes; below the range that Linux gives out by itself.
endpoint="${hosts%%$'\n'*}:$((10000 + SLURM_JOB_ID % 20000))"

# srun gives a task only the cores of --cpus-per-task if Slurm binds it; the ranks of a node need all of them.
# is_host and local-addr are said outright: torchrun would guess them from the host's own name, which fails
# where a node goes by another one, and ranks follow the order of these addresses.
# shellcheck disable=SC2016  # expanded on each node
exec srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 bash -c '
  set -eu
  ranks_per_node=$1 endpoint=$2
  shift 2
  threads=$((${SLURM_CPUS_ON_NODE:-1} / ranks_per_node))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
  echo "node $((SLURM_NODEID + 1)) of $SLURM_NNODES: $SLURMD_NODENAME, $ranks_per_node ranks, rendezvous at $endpoint"
  exec torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$ranks_per_node" \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="$SLURMD_NODENAME" "$@"
' node "$ranks_per_node" "$endpoint" "$root/launch/train.py" "${overrides[@]}"
