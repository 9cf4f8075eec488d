"""A method that answers prompts, from checked arguments to the exit status: data, models, loop.

Everything that can be wrong is checked in the order in which it is cheap; the models load last.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment import runtime
from alignment.arguments import OnlineArguments
from alignment.engine.engine import Engine, OptimizerSettings
from alignment.errors import ArgumentsError, DataError
from alignment.flow.checkpoint import CheckpointStore
from alignment.flow.feeds import PromptFeed, as_prompt
from alignment.flow.flow import optimizer_of
from alignment.flow.loop import Given, Loop
from alignment.flow.method import Method, RoleSpec, offload_levels
from alignment.flow.output import prepare_output_dir
from alignment.flow.ptx import PtxStream
from alignment.flow.resume import check_resumable, check_same_data
from alignment.flow.runner import describe_run, main_first, model_flags, stage_template
from alignment.flow.sample import show_sample, show_scored
from alignment.log import get_logger
from alignment.parallel import World
from alignment.parallel.offload import build_residency
from alignment.ppo.data import (
    PromptOnlyDataset,
    PromptTemplate,
    SupervisedDataset,
    check_same,
    load_train_and_eval,
)
from alignment.ppo.data.encode import Limits, prompt_messages
from alignment.ppo.data.splits import warn_of_shared_prompts
from alignment.ppo.models import (
    check_layout,
    check_model_folder,
    check_tokenizer_fits,
    keep_tokens,
    load_causal_lm,
    load_score_model,
    load_tokenizer,
    model_context_length,
    save_tokenizer,
    tokenizer_differs,
    vocabulary_size,
)
from alignment.rollout.generate import GenerationEngine
from alignment.rollout.layouts import RolloutEngine
from alignment.rollout.rewards import RewardBatch, RewardResult, WeightedRewards, resolve_rewards, uses_model
from alignment.rollout.rewards.reward_model import RewardModelScorer
from alignment.rollout.roles import PolicyRole, RewardRole, ValueRole
from alignment.rollout.rollout import Rollout
from alignment.rollout.stopping import eos_token_ids

if TYPE_CHECKING:
    from alignment.flow.online import OnlineMethod


@dataclass
class RunData:
    """Tokenizer, template and data sets of a run.

    Attributes:
        tokenizer: the actor's and critic's.
        template: the run's prompt template.
        train: prompts to learn on.
        eval_prompts: prompts to evaluate on; may be empty.
        ptx: supervised rows, or ``None``.
        formats: tokenizer and template of a model that scores, by what it gives (``"reward"``), where it needs answers
            tokenised anew.
        sets: the data sets by name, for the summaries.
    """

    tokenizer: Any
    template: Any
    train: Any
    eval_prompts: list[Any]
    ptx: Any | None
    formats: dict[str, tuple[Any, Any]]
    sets: dict[str, Any]

    @property
    def prompt_sets(self) -> list[Any]:
        """The data sets whose rows are answered and rewarded."""
        return [self.sets[name] for name in ("train", "eval") if name in self.sets]


def run_online(method: OnlineMethod, world: World, argv: list[str]) -> int:
    """Train and evaluate as the method's arguments say.

    Returns:
        The exit status: 0, or 130 after an interruption.

    Raises:
        AlignmentError: whatever the user can mend.
    """
    args = method.args
    check_models(method, world.topology)
    store = CheckpointStore(args.output_dir, args.save_total_limit)
    resume_path = None if args.dry_run else prepare_output_dir(args, world, store)
    check_resumable(args, world, resume_path)
    # What is wrong with a reward is said before anything heavy is read; its model comes later.
    sources = resolve_sources(method)
    world.phase("data")
    data = main_first(world, lambda: load_data(method, show_progress=world.is_main, resume=resume_path))
    check_same_data(args, world, resume_path, data.sets)
    if world.is_main:
        show_samples(method, data)
    sizes = args.derive_sizes(len(data.train), world.size)
    if args.dry_run:
        if world.is_main:
            print(args.dry_run_text(sizes))
        return 0
    describe_run(args, world, data, sizes)
    runtime.seed_everything(args.seed)
    world.phase("models")
    return build_loop(method, world, data, sizes, argv, sources).train(resume_path)


def needed_roles(method: Method) -> list[RoleSpec]:
    """The roles that this run loads: all, or those that evaluation needs."""
    return [spec for spec in method.roles() if spec.present and (method.args.do_train or spec.evaluates)]


def resolve_sources(method: OnlineMethod) -> dict[str, WeightedRewards]:
    """What scores the answers, by what it gives; models are given to it later.

    Raises:
        RewardError: as in :func:`~alignment.rollout.rewards.resolve_rewards`.
    """
    args = method.args
    return {
        name: resolve_rewards(getattr(args, name), _model_comes_later, args.reward_timeout, name)
        for name in method.scored
    }


def _model_comes_later(batch: Any) -> Any:
    raise RuntimeError("the model is not loaded yet")


def check_models(method: Method, topology: Any) -> None:
    """Refuse folders that cannot be loaded and limits that do not fit, before anything heavy is read.

    Raises:
        AlignmentError: naming the key and what is wrong.
    """
    args, seen = method.args, set[str]()
    for average in (average for call in method.checked_flow().calls for average in call.after):
        if average.share < 1.0 and args.bf16:
            raise ArgumentsError(
                f"bf16: the {average.target} follows the {average.source} by a share of {average.share:g}, and in "
                "bfloat16 so small a step is rounded away: set bf16 to false, or the share to 1"
            )
    specs = needed_roles(method)
    # A model that only scores may read answers written anew for it: its context is looked at later.
    for spec in [*(s for s in specs if s.kind == "score"), *(s for s in specs if s.kind != "score")]:
        if spec.key in seen:
            continue
        seen.add(spec.key)
        path = getattr(args, spec.key)
        found = check_model_folder(path, role=spec.key)
        if found is not None:
            check_layout(found.config, topology, f"{spec.key}={path}")
        if spec.kind != "score":
            args.check_context(model_context_length(path), f"{spec.key}={path}")


def check_score_context(args: OnlineArguments, name: str) -> None:
    """Refuse a reward model (or what else ``name`` is) whose context is shorter than the rows that it is to read as
    they were sampled.

    Raises:
        ArgumentsError: the limits that were given do not fit.
    """
    if uses_model(getattr(args, name)):
        key = f"{name}_model_name_or_path"
        args.check_context(model_context_length(getattr(args, key)), f"{key}={getattr(args, key)}")


def load_data(method: OnlineMethod, show_progress: bool = True, resume: Path | None = None) -> RunData:
    """Load tokenizer and data sets and settle the prompt template; ``resume`` is the checkpoint to go on from.

    Raises:
        AlignmentError: a data set, template or tokenizer cannot be used.
    """

    args = method.args
    actor = args.actor_model_name_or_path
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or actor, role="actor tokenizer")
    check_tokenizer_fits(tokenizer, actor, role="actor")
    for spec in needed_roles(method):
        if spec.kind == "value":
            check_tokenizer_fits(tokenizer, getattr(args, spec.key), role=spec.name)
    template = stage_template(args, tokenizer, actor, resume)
    formats = {}
    for name in method.scored:
        own = own_format(method, name, tokenizer, template)
        if own is None:
            check_score_context(args, name)
        else:  # answers are written anew for it, cut to its context, and counted
            formats[name] = own
    common = {"template": template, **args.data_options(show_progress)}
    prompts = {**common, "max_length": args.max_src_len, "max_src_len": args.max_src_len}

    def load(mixture: Any, name: str, evaluation: bool = False) -> Any:
        return PromptOnlyDataset(mixture, tokenizer, name=name, evaluation=evaluation, **prompts)

    sets = load_train_and_eval(
        load,
        args.train_datasets,
        args.eval_datasets,
        ratio=args.eval_split_ratio,
        seed=args.seed,
        do_eval=args.do_eval,
        check=args.do_train,
    )
    train, held_out = sets["train"], sets.get("eval")
    if not len(train):
        raise DataError("no training prompt is left")
    ptx = None
    if args.use_ptx:
        limit = args.max_src_len + args.max_dec_len
        ptx = SupervisedDataset(
            args.ptx_datasets, tokenizer, max_length=limit, max_src_len=args.max_src_len, name="ptx", **common
        )
        sets["ptx"] = ptx
        if held_out is not None:
            warn_of_shared_prompts(ptx, held_out)
    eval_prompts: list[Any] = []
    if held_out is not None:
        count = len(held_out) if args.eval_num_samples is None else min(args.eval_num_samples, len(held_out))
        eval_prompts = [as_prompt(held_out[i], i) for i in range(count)]
    return RunData(tokenizer, template, train, eval_prompts, ptx, formats, sets)


def show_samples(method: OnlineMethod, data: RunData) -> None:
    """Show a row of the run as each of its models reads it.

    Raises:
        DataError: a tokenizer's own file gives other ids than were used, or the reward model's template has no place
            for something in a prompt.
    """

    args = method.args
    roles = ["actor", *(spec.name for spec in needed_roles(method) if spec.kind == "value")]
    read_the_same = [name for name in method.scored if uses_model(getattr(args, name)) and name not in data.formats]
    roles += [f"{name} model" for name in read_the_same]
    with_ids = args.show_sample_ids
    show_sample(data.train, ", ".join(roles), with_ids=with_ids, what=" [[the actor's answer]]")
    if data.ptx is not None:
        show_sample(data.ptx, "actor (ptx)", with_ids=with_ids)
    for name, (tokenizer, template) in data.formats.items():
        for prompts in data.prompt_sets:
            prompts.check_template(template, f"the {name} model's template ({name}_prompt_template)")
        sample = data.train.example
        show_scored(
            prompt_messages(sample),
            sample.get("tools"),
            tokenizer,
            template,
            Limits(max_length=args.max_src_len + 2 * args.max_dec_len),
            with_ids=with_ids,
            role=f"{name} model",
        )


def own_format(method: OnlineMethod, name: str, tokenizer: Any, template: Any) -> tuple[Any, Any] | None:
    """Tokenizer and template of the model that gives ``name`` (``"reward"``) where they are not the actor's, else None.

    Raises:
        AlignmentError: the templates differ and that was not allowed, or a critic would start from a model whose tokens
            are not the actor's.
    """
    args = method.args
    if not uses_model(getattr(args, name)):
        return None
    folder, title = getattr(args, f"{name}_model_name_or_path"), f"{name} model"
    own = load_tokenizer(getattr(args, f"{name}_tokenizer_name_or_path") or folder, role=f"{title}'s tokenizer")
    check_tokenizer_fits(own, folder, role=title)
    wanted = getattr(args, f"{name}_prompt_template")
    own_template, saved, why = PromptTemplate.for_model(wanted, own, folder)
    if wanted != "auto":
        check_same(saved, own_template, f"the {title} {folder}", "this run", args.allow_template_mismatch)
    elif saved is not None:
        check_same(saved, template, f"the {title} {folder}", "this run", args.allow_template_mismatch)
    elif own_template.kind == "beaver":  # neither saved nor the tokenizer's: nothing says what it was trained with
        own_template, why = PromptTemplate.resolve(template, own), "it has none of its own; the run's"
    own_template = own_template.with_choices_of(template)
    get_logger().info("%s's prompt template: %s (%s)", title, own_template.describe(), why)
    other_tokens = tokenizer_differs(tokenizer, own)
    for spec in needed_roles(method):
        if spec.kind == "value" and other_tokens and Path(getattr(args, spec.key)).resolve() == Path(folder).resolve():
            raise ArgumentsError(
                f"the {spec.name} would start from the {title} {folder}, but that has another tokenizer than the "
                f"actor, so its values would be of other tokens: set {spec.key} to a model with the actor's tokenizer "
                f"({args.actor_model_name_or_path} itself will do: it gets a new head)"
            )
    if other_tokens or own_template.to_dict() != template.to_dict():
        what = "tokenizer" if other_tokens else "template"
        get_logger().info("the %s has another %s than the actor: answers are written anew for it", title, what)
        return own, own_template
    return None


def build_loop(
    method: OnlineMethod,
    world: World,
    data: RunData,
    sizes: Any,
    argv: list[str],
    sources: Mapping[str, WeightedRewards] | None = None,
) -> Loop:
    """Load the models and put the loop together; ``sources`` None: those that the arguments name."""
    args = method.args
    sources = sources or resolve_sources(method)
    for name, source in sources.items():
        if method.partial_rewards:
            source.allow_partial()
        source.settle_columns(dict.fromkeys(column for rows in data.prompt_sets for column in rows.columns()))
        get_logger().info("%s: %s", name, source)
    specs, flow = method.roles(), method.flow()
    residency = build_residency(
        args.offload_level,
        flow.residency(),
        method.between(),
        args.offload_dir,
        args.on_cpu,
        offload_levels(specs),
    )
    tokens = vocabulary_size(data.tokenizer)
    roles: dict[str, Any] = {}
    running_normalization = bool(args.normalize_reward)
    for spec in needed_roles(method):
        model = load_role(spec, method, world, tokens)
        settings = optimizer_settings(spec, args, sizes.total_steps) if spec.trained and args.do_train else None
        recompute = args.critic_recompute if spec.kind == "value" else args.recompute
        engine = Engine(spec.name, model, world, settings, recompute=settings is not None and bool(recompute))
        if residency is not None:
            # handed over as soon as it is loaded: at most one that may leave is in memory while the others load
            residency.add(spec.name, engine.model.parameters, frozen=not spec.folder)
            if engine.trainable:
                residency.add(optimizer_of(spec.name), engine.optimizer_tensors)
        if spec.kind == "score" and spec.name == "reward" and args.normalize_reward and int(model.normalizer.count) > 0:
            get_logger().info("normalize_reward: by the statistics that are stored with the reward model")
            model.config.do_normalize, running_normalization = True, False
        roles[spec.name] = make_role(spec, engine, args)
    actor = roles["actor"].engine
    eos_ids, context = eos_token_ids(actor.model, data.tokenizer), model_context_length(args.actor_model_name_or_path)
    for spec in needed_roles(method):
        if spec.kind == "score":
            folder = getattr(args, spec.key)
            reads = data.formats.get(spec.name, (data.tokenizer, data.template))
            limit = model_context_length(folder) or args.max_src_len + 2 * args.max_dec_len
            scorer = RewardModelScorer(roles[spec.name], *reads, eos_ids, limit, anew=spec.name in data.formats)
            roles[spec.name].scorer = scorer
            if spec.name in sources:
                sources[spec.name].use_model(scorer)

    generator = RolloutEngine(
        actor,
        world,
        args.eval_mode or "",
        lambda model, schedule: GenerationEngine(
            model,
            data.tokenizer,
            eos_ids,
            context,
            args.per_device_train_batch_size,
            schedule,
            fused=args.use_fusemt,
            token_budget=args.rollout_token_budget,
            most_rows=args.per_device_rollout_batch_size if args.per_device_rollout_batch_size > 0 else None,
            tokens=tokens,
            masking=method.masking(roles),
            progress=not args.disable_tqdm if world.is_main else None,
        ),
    )

    def save_extras(folder: Path) -> None:
        save_tokenizer(data.tokenizer, folder, data.template)

    def score(source: WeightedRewards, rollout: Rollout) -> RewardResult:
        texts = None
        if args.reward_sees_special_tokens:
            stop = generator.stop_rule(args.stop_strings or ())
            ends = zip(rollout.tokens, rollout.prompt_len, rollout.lengths, rollout.finished, strict=True)
            texts = [stop.text(row[begin:end].tolist(), done, special=True) for row, begin, end, done in ends]
        return source.score(RewardBatch.from_rollout(rollout, texts))

    ptx = None
    if data.ptx is not None:
        ptx = PtxStream(data.ptx, args.seed + 1, generator.pad_id, args.shuffle)
    scores = {name: functools.partial(score, source) for name, source in sources.items()}
    given = Given(generator, scores, data.eval_prompts, running_normalization, generator.tokenizer.decode)
    feed = PromptFeed(data.train, args, sizes, world)
    return Loop(method, world, roles, feed, sizes, save_extras, argv, given, ptx, residency)


def load_role(spec: RoleSpec, method: Method, world: World, tokens: int) -> Any:
    """The model of a role; ``tokens`` is how many the vocabulary has."""
    args = method.args
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "config_overrides": model_flags(args),
        "topology": world.topology,
        **spec.options,
    }
    path = getattr(args, spec.key)
    if spec.kind == "policy":
        model = load_causal_lm(path, role=spec.name, **options)
        keep_tokens(model, tokens)
        return model
    if spec.kind == "value":
        return load_score_model(path, role=spec.name, **{"score_type": "critic", **options})
    usual = {"score_type": "reward", "do_normalize": False, "new_head": "used"}
    return load_score_model(path, role=f"{spec.name} model", **{**usual, **options})


def optimizer_settings(spec: RoleSpec, args: OnlineArguments, total_steps: int) -> OptimizerSettings:
    """A role's; its schedule has the steps in which it learns."""
    steps = max(1, total_steps - spec.starts_at)
    return OptimizerSettings(**(args.critic_optimizer(steps) if spec.kind == "value" else args.policy_optimizer(steps)))


def make_role(spec: RoleSpec, engine: Engine, args: OnlineArguments) -> Any:
    """The role around an engine."""
    rows, budget = args.rollout_logprob_batch_size or args.per_device_train_batch_size, args.max_tokens_per_micro_batch
    if spec.kind == "policy":
        temperature = args.temperature if spec.temperature is None else spec.temperature
        entropy_grad = args.entropy_coeff != 0.0
        return PolicyRole(engine, temperature, rows, budget, entropy_grad=entropy_grad, masked=spec.masked)
    if spec.kind == "value":
        return ValueRole(engine, rows, budget)
    return RewardRole(engine, rows, budget)
