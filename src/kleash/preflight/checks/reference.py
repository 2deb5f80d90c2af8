"""Checks `reference.*`: is the reference frozen, apart from the policy, and of one vocabulary?"""

from kleash.errors import ModelError
from kleash.models.policy import Policy, check_compatible
from kleash.models.reference_offload import FrozenReference, underlying
from kleash.models.sharding import own, whole
from kleash.preflight.findings import Check, Finding, some
from kleash.preflight.probe_batch import Trial
from kleash.training.quantization_floor import has_floor, quantization_floor

_TIMES = 3.0
"""Of the floor, that a target has to be."""


def identity(trial: Trial) -> Finding:
    """Which reference this is, by its fingerprint."""
    mine, theirs = trial.components.policy.identity(), trial.components.reference.identity()
    measured = f"{theirs.how}, {theirs.dtype}, {theirs.sha256[:12]}… from {theirs.path}"
    check = Check("reference.identity", "the policy's own weights, or reference_differs")
    differs = trial.config.reference.reference_differs
    if mine.sha256 == theirs.sha256 or differs or not trial.at_start:
        return check.ok(measured)
    return check.fail(
        f"{measured}; the policy is {mine.sha256[:12]}… from {mine.path}",
        f"The reference {theirs.path!r} has other weights than the policy {mine.path!r}.",
        "Leave reference.path out (the reference is then the policy as it starts), or set "
        "reference.reference_differs: true if it is meant.",
    )


def frozen(trial: Trial) -> Finding:
    """No parameter of the reference requires a gradient or is in the optimiser."""
    check = Check("reference.frozen", "no parameter of the reference can learn")
    reference = underlying(trial.components.reference)
    if reference.adapter is not None:
        return check.skip("The reference is the policy with its adapter off.")
    learning = {id(p) for group in trial.components.optimizer.param_groups for p in group["params"]}
    named = list(reference.model.named_parameters())
    guilty = [key for key, p in named if p.requires_grad or id(p) in learning]
    if not guilty:
        return check.ok(f"{len(named)} parameters, none learns")
    return check.fail(
        f"{len(guilty)} of {len(named)} parameters can learn",
        f"The reference is not frozen: {some(guilty)} check for gradients or are in the optimiser.",
        "Call requires_grad_(False) on the reference, and give the optimiser the policy's "
        "parameters alone.",
    )


def storage(trial: Trial) -> Finding:
    """The reference has weights of its own."""
    check = Check("reference.storage", "no storage shared with weights that learn")
    reference, policy = underlying(trial.components.reference), trial.components.policy
    if reference.adapter is not None:
        return _adapter_storage(trial, check)
    trial.components.release()
    # A slice of a divided weight may be empty, and has no storage then.
    held = [own(p) for p in policy.parameters()]
    learning = {p.untyped_storage().data_ptr() for p in held if p.numel()}
    named = [(key, own(p)) for key, p in reference.model.named_parameters()]
    shared = [key for key, p in named if p.untyped_storage().data_ptr() in learning]
    if not shared:
        return check.ok(f"{len(named)} parameters of its own")
    return check.fail(
        f"{len(shared)} of {len(named)} parameters shared",
        f"The reference shares storage with the policy ({some(shared)}): it moves with every "
        "update and the KL stays near 0.",
        "Make the reference with kleash.models.policy.freeze_copy or load_reference.",
    )


def adapter(trial: Trial) -> Finding:
    """With an adapter, only it learns, and its off position is the model the run starts from."""
    check = Check("reference.adapter", "the adapter starts as no change; only it learns")
    policy, reference = trial.components.policy, underlying(trial.components.reference)
    if policy.adapter is None:
        return check.skip("No adapter: all weights are trained.")
    if reference.adapter is None:
        return check.ok("the reference is a model of its own")
    moved = [
        key
        for key, p in policy.model.named_parameters()
        if "lora_B" in key and bool(whole(p.detach()).abs().max() > 0)
    ]
    if not trial.at_start or not moved:
        return check.ok(f"fresh adapter, off = {policy.path}")
    return check.fail(
        f"{len(moved)} adapter matrices are not 0",
        "The adapter was trained before, so the reference (the adapter off) is the bare base and "
        "not the fine-tuned model the run starts from.",
        "Merge the adapter into the weights (merge_and_unload) and give the merged model as "
        "policy.path, or name its directory in policy.adapter, which merges it.",
    )


def quantization(trial: Trial) -> Finding:
    """What quantising one of the two models costs before anything is learnt, in nats."""
    config = trial.config
    check = Check("reference.quantization", "a target above three times what quantisation costs")
    policy, reference = config.policy.quantization, config.reference.quantization
    if policy == reference == "none":
        return check.skip("Nothing is quantised.")
    kinds = f"policy {policy}, reference {reference}"
    if policy == reference:
        return check.ok(
            f"{kinds}: 0 nats; the KL is to the quantised model, and its distance from the full "
            f"weights is measured by kleash audit {policy}:{config.policy.path} "
            f"{config.policy.path}"
        )
    if not has_floor(config.policy, config.reference) or not trial.at_start:
        return check.skip("The KL between the two is not that of quantisation alone.")
    mask = trial.rollout.response_mask
    found = quantization_floor(trial.scored.kl, mask, trial.rollout.prompt_index)
    error, floor = found.per_response.standard_error, found.per_response.mean
    spread = "" if error is None else f" ± {error:.2g}"
    measured = f"{kinds}: {found.per_token.mean:.3g} nats per token, {floor:.3g}{spread} a response"
    target = config.leash.target_kl
    if target is None or target >= _TIMES * floor:
        return check.ok(measured)
    return check.warn(
        measured,
        f"leash.target_kl = {target:g} is under three times the KL that quantisation alone gives "
        f"({floor:.3g} nats per response): most of the budget would be spent on it.",
        f"Set leash.target_kl: {10 * floor:.1g} or more, or quantise both or neither: "
        "policy.quantization and reference.quantization alike.",
    )


def vocabulary(model: Policy, frozen: FrozenReference) -> Finding:
    """Policy and reference speak of the same tokens; otherwise nothing can be scored."""
    check = Check("reference.vocabulary", "the same id for every token in both models")
    policy, reference = model, underlying(frozen)
    notes: list[str] = []
    try:
        notes = check_compatible(policy, reference).notes
    except ModelError as error:
        if "frozen reference of its own" not in str(error):
            return check.fail(
                f"{policy.words} and {reference.words} tokens",
                f"Policy and reference do not share a vocabulary: {error}.",
                "Take two models of one tokenizer.",
            )
    return check.ok(" ".join([f"{policy.words} tokens", *notes]))


def _adapter_storage(trial: Trial, check: Check) -> Finding:
    named = trial.components.policy.model.named_parameters()
    base = [key for key, p in named if p.requires_grad and "lora_" not in key]
    if not base:
        return check.ok("base weights learn nothing")
    return check.fail(
        f"{len(base)} base weights learn",
        f"Weights under the adapter learn too ({some(base)}): the reference, which is the model "
        "with its adapter off, moves with them.",
        "Freeze the base; only parameters named lora_ may ask for gradients.",
    )
