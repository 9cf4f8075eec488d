"""PPO from a JSON file: arguments -> data -> models -> :class:`~alignment.ppo.ppo_trainer.PPOTrainer`.

::

    python -u -m paddle.distributed.launch run_ppo.py ../../config/llama/ppo_argument.json
    python -m alignment ppo config/llama/ppo_argument.json output_dir=checkpoints/mine
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: make the checkout importable, its folder's names (data, ...) not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.arguments import PPOArguments, parse_ppo
from alignment.cli import run_main
from alignment.errors import ArgumentsError, DataError
from alignment.log import get_logger


@dataclass
class RunData:
    """Tokenizer, template and data sets of a run.

    Attributes:
        tokenizer: the actor's and critic's.
        template: the run's prompt template.
        train: prompts to learn on.
        eval_prompts: prompts to evaluate on; may be empty.
        ptx: supervised rows, or ``None``.
        reward_tokenizer: the reward model's own, where it needs answers tokenised anew, else ``None``.
        reward_template: likewise.
        sets: the data sets by name, for the summaries.
    """

    tokenizer: Any
    template: Any
    train: Any
    eval_prompts: list[Any]
    ptx: Any | None
    reward_tokenizer: Any | None
    reward_template: Any | None
    sets: dict[str, Any]

    @property
    def prompt_sets(self) -> list[Any]:
        """The data sets whose rows are answered and rewarded."""
        return [self.sets[name] for name in ("train", "eval") if name in self.sets]


def main(argv: list[str]) -> int:
    """Run PPO with ``argv`` (a JSON file and overrides).

    Returns:
        The exit status: 0, or 130 after an interruption.

    Raises:
        AlignmentError: whatever the user can mend.
    """
    from alignment.flow.runner import run_stage
    from alignment.methods.start import chosen_method, run_method

    other = chosen_method(argv)  # paddlenlp's rl_algorithm
    if other is not None:
        return run_method(other, argv)
    return run_stage(argv, parse_ppo, _run)


def _run(args: PPOArguments, world: Any, argv: list[str]) -> int:
    from alignment import runtime
    from alignment.flow.checkpoint import CheckpointStore
    from alignment.flow.output import prepare_output_dir
    from alignment.flow.resume import check_resumable, check_same_data
    from alignment.flow.runner import describe_run, main_first
    from alignment.rollout.rewards import resolve_rewards

    check_models(args, world.topology)
    store = CheckpointStore(args.output_dir, args.save_total_limit)
    resume_path = None if args.dry_run else prepare_output_dir(args, world, store)
    check_resumable(args, world, resume_path)
    # What is wrong with a reward is said before anything heavy is read; its model comes later.
    rewards = resolve_rewards(args.reward, _model_comes_later, args.reward_timeout)
    world.phase("data")
    data = main_first(world, lambda: load_data(args, show_progress=world.is_main, resume=resume_path))
    check_same_data(args, world, resume_path, data.sets)
    if world.is_main:
        show_samples(args, data)
    sizes = args.derive_sizes(len(data.train), world.size)
    if args.dry_run:
        if world.is_main:
            print(args.dry_run_text(sizes))
        return 0
    describe_run(args, world, data, sizes)
    runtime.seed_everything(args.seed)
    world.phase("models")
    return build_trainer(args, world, data, sizes, argv, rewards).train(resume_path)


def _model_comes_later(batch: Any) -> Any:
    raise RuntimeError("the reward model is not loaded yet")


def check_models(args: PPOArguments, topology: Any) -> None:
    """Refuse folders that cannot be loaded and limits that do not fit, before anything heavy is read.

    Raises:
        AlignmentError: naming the key and what is wrong.
    """
    from alignment.ppo.models import check_layout, check_model_folder, model_context_length
    from alignment.rollout.rewards import uses_model

    folders: dict[str, str] = {"actor_model_name_or_path": args.actor_model_name_or_path}
    if uses_model(args.reward):
        found = check_model_folder(args.reward_model_name_or_path, role="reward_model_name_or_path")
        if found is not None:
            check_layout(found.config, topology, f"reward_model_name_or_path={args.reward_model_name_or_path}")
    if args.do_train:
        folders["reward_critic_model_name_or_path"] = args.reward_critic_model_name_or_path
    for key, path in folders.items():
        found = check_model_folder(path, role=key)
        if found is not None:
            check_layout(found.config, topology, f"{key}={path}")
        args.check_context(model_context_length(path), f"{key}={path}")


def check_reward_context(args: PPOArguments) -> None:
    """Refuse a reward model whose context is shorter than the rows that it is to read as they were sampled.

    Raises:
        ArgumentsError: the limits that were given do not fit.
    """
    from alignment.ppo.models import model_context_length
    from alignment.rollout.rewards import uses_model

    if uses_model(args.reward):
        path = args.reward_model_name_or_path
        args.check_context(model_context_length(path), f"reward_model_name_or_path={path}")


def load_data(args: PPOArguments, show_progress: bool = True, resume: Path | None = None) -> RunData:
    """Load tokenizer and data sets and settle the prompt template; ``resume`` is the checkpoint to go on from.

    Raises:
        AlignmentError: a data set, template or tokenizer cannot be used.
    """
    from alignment.flow.runner import stage_template
    from alignment.ppo.data import PromptOnlyDataset, SupervisedDataset, load_train_and_eval
    from alignment.ppo.data.splits import warn_of_shared_prompts
    from alignment.ppo.models import check_tokenizer_fits, load_tokenizer
    from alignment.ppo.ppo_trainer import as_prompt

    actor = args.actor_model_name_or_path
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or actor, role="actor tokenizer")
    check_tokenizer_fits(tokenizer, actor, role="actor")
    if args.do_train:
        check_tokenizer_fits(tokenizer, args.reward_critic_model_name_or_path, role="critic")
    template = stage_template(args, tokenizer, actor, resume)
    reward_tokenizer, reward_template = own_reward_format(args, tokenizer, template)
    if reward_tokenizer is None:  # else answers are written anew for it, cut to its context, and counted
        check_reward_context(args)
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
    return RunData(tokenizer, template, train, eval_prompts, ptx, reward_tokenizer, reward_template, sets)


def show_samples(args: PPOArguments, data: RunData) -> None:
    """Show a row of the run as each of its models reads it.

    Raises:
        DataError: a tokenizer's own file gives other ids than were used, or the reward model's template has no place
            for something in a prompt.
    """
    from alignment.flow.sample import show_sample, show_scored
    from alignment.ppo.data.encode import Limits, prompt_messages
    from alignment.rollout.rewards import uses_model

    roles = ["actor"] + ["critic"] * bool(args.do_train)
    own_reward = data.reward_tokenizer is not None
    roles += ["reward model"] * (uses_model(args.reward) and not own_reward)
    with_ids = args.show_sample_ids
    show_sample(data.train, ", ".join(roles), with_ids=with_ids, what=" [[the actor's answer]]")
    if data.ptx is not None:
        show_sample(data.ptx, "actor (ptx)", with_ids=with_ids)
    if own_reward:
        for prompts in data.prompt_sets:
            prompts.check_template(data.reward_template, "the reward model's template (reward_prompt_template)")
        sample = data.train.example
        show_scored(
            prompt_messages(sample),
            sample.get("tools"),
            data.reward_tokenizer,
            data.reward_template,
            Limits(max_length=args.max_src_len + 2 * args.max_dec_len),
            with_ids=with_ids,
        )


def own_reward_format(args: PPOArguments, tokenizer: Any, template: Any) -> tuple[Any | None, Any | None]:
    """The reward model's tokenizer and template where they are not the actor's, else ``(None, None)``.

    Raises:
        AlignmentError: the templates differ and that was not allowed, or the critic would start from a model whose
            tokens are not the actor's.
    """
    from alignment.ppo.data import PromptTemplate, check_same
    from alignment.ppo.models import check_tokenizer_fits, load_tokenizer, tokenizer_differs
    from alignment.rollout.rewards import uses_model

    if not uses_model(args.reward):
        return None, None
    folder = args.reward_model_name_or_path
    own = load_tokenizer(args.reward_tokenizer_name_or_path or folder, role="reward model's tokenizer")
    check_tokenizer_fits(own, folder, role="reward model")
    own_template, saved, why = PromptTemplate.for_model(args.reward_prompt_template, own, folder)
    if args.reward_prompt_template != "auto":
        check_same(saved, own_template, f"the reward model {folder}", "this run", args.allow_template_mismatch)
    elif saved is not None:
        check_same(saved, template, f"the reward model {folder}", "this run", args.allow_template_mismatch)
    elif own_template.kind == "beaver":  # neither saved nor the tokenizer's: nothing says what it was trained with
        own_template, why = PromptTemplate.resolve(template, own), "it has none of its own; the run's"
    own_template = own_template.with_choices_of(template)
    get_logger().info("reward model's prompt template: %s (%s)", own_template.describe(), why)
    other_tokens = tokenizer_differs(tokenizer, own)
    critic = Path(args.reward_critic_model_name_or_path)
    if args.do_train and other_tokens and critic.resolve() == Path(folder).resolve():
        raise ArgumentsError(
            f"the critic would start from the reward model {folder}, but that has another tokenizer than the actor, so "
            "its values would be of other tokens: set reward_critic_model_name_or_path to a model with the actor's "
            f"tokenizer ({args.actor_model_name_or_path} itself will do: it gets a new head)"
        )
    if other_tokens or own_template.to_dict() != template.to_dict():
        what = "tokenizer" if other_tokens else "template"
        get_logger().info("the reward model has another %s than the actor: answers are written anew for it", what)
        return own, own_template
    return None, None


def build_trainer(
    args: PPOArguments, world: Any, data: RunData, sizes: Any, argv: list[str], rewards: Any = None
) -> Any:
    """Load the models and put the trainer together; ``rewards`` None: those that the arguments name."""
    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.flow.flow import PPO_BETWEEN, PPO_ITERATION, optimizer_of
    from alignment.flow.runner import model_flags
    from alignment.parallel.offload import build_residency
    from alignment.ppo.models import (
        keep_tokens,
        load_causal_lm,
        load_score_model,
        model_context_length,
        save_tokenizer,
        vocabulary_size,
    )
    from alignment.ppo.phases import Roles
    from alignment.ppo.ppo_trainer import PPOTrainer
    from alignment.rollout.generate import GenerationEngine
    from alignment.rollout.layouts import RolloutEngine
    from alignment.rollout.rewards import RewardBatch, RewardResult, resolve_rewards, uses_model
    from alignment.rollout.rewards.reward_model import RewardModelScorer
    from alignment.rollout.roles import PolicyRole, RewardRole, ValueRole
    from alignment.rollout.rollout import Rollout
    from alignment.rollout.stopping import eos_token_ids

    budget = args.max_tokens_per_micro_batch
    infer_rows = args.rollout_logprob_batch_size or args.per_device_train_batch_size
    most_rows = args.per_device_rollout_batch_size if args.per_device_rollout_batch_size > 0 else None
    model_options: dict[str, Any] = {
        "dtype": args.dtype,
        "config_overrides": model_flags(args),
        "topology": world.topology,
    }
    actor_path = args.actor_model_name_or_path

    rewards = rewards or resolve_rewards(args.reward, _model_comes_later, args.reward_timeout)
    rewards.settle_columns(dict.fromkeys(name for rows in data.prompt_sets for name in rows.columns()))
    get_logger().info("reward: %s", rewards)
    residency = build_residency(
        args.offload_level, PPO_ITERATION.residency(), PPO_BETWEEN, args.offload_dir, args.on_cpu
    )

    def offloaded(engine: Engine) -> Engine:
        """Hand a model over as soon as it is loaded: at most one that may leave is in memory while the others load."""
        if residency is not None:
            residency.add(engine.name, engine.model.parameters, frozen=not engine.trainable)
            if engine.trainable:
                residency.add(optimizer_of(engine.name), engine.optimizer_tensors)
        return engine

    actor_settings = None
    if args.do_train:
        # the actor's schedule has the steps in which the actor learns
        own_steps = max(1, sizes.total_steps - args.critic_warmup_steps)
        actor_settings = OptimizerSettings(**args.policy_optimizer(own_steps))
    tokens = vocabulary_size(data.tokenizer)

    def policy_model(role: str) -> Any:
        model = load_causal_lm(actor_path, role=role, **model_options)
        keep_tokens(model, tokens)
        return model

    actor_model = policy_model("actor")
    actor = offloaded(Engine("actor", actor_model, world, actor_settings, recompute=bool(args.recompute)))
    reference = critic = None
    if args.do_train:
        reference = offloaded(Engine("reference", policy_model("reference"), world))
        critic_settings = OptimizerSettings(**args.critic_optimizer(sizes.total_steps))
        critic_model = load_score_model(
            args.reward_critic_model_name_or_path, score_type="critic", role="critic", **model_options
        )
        critic = offloaded(
            Engine("critic", critic_model, world, critic_settings, recompute=bool(args.critic_recompute))
        )
    eos_ids, context = eos_token_ids(actor.model, data.tokenizer), model_context_length(actor_path)
    reward_role = None
    running_normalization = bool(args.normalize_reward)
    if uses_model(args.reward):
        reward_path = args.reward_model_name_or_path
        model = load_score_model(
            reward_path, score_type="reward", do_normalize=False, new_head="used", role="reward model", **model_options
        )
        if args.normalize_reward and int(model.normalizer.count) > 0:
            get_logger().info("normalize_reward: by the statistics that are stored with the reward model")
            model.config.do_normalize, running_normalization = True, False
        reward_role = RewardRole(offloaded(Engine("reward", model, world)), infer_rows, budget)
        limit = model_context_length(reward_path) or args.max_src_len + 2 * args.max_dec_len
        anew = data.reward_tokenizer is not None
        reads = (data.reward_tokenizer, data.reward_template) if anew else (data.tokenizer, data.template)
        rewards.use_model(RewardModelScorer(reward_role, *reads, eos_ids, limit, anew=anew))

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
            most_rows=most_rows,
            tokens=tokens,
            progress=not args.disable_tqdm if world.is_main else None,
        ),
    )

    def save_extras(folder: Path) -> None:
        save_tokenizer(data.tokenizer, folder, data.template)

    def score(rollout: Rollout) -> RewardResult:
        texts = None
        if args.reward_sees_special_tokens:
            stop = generator.stop_rule(args.stop_strings or ())
            ends = zip(rollout.tokens, rollout.prompt_len, rollout.lengths, rollout.finished, strict=True)
            texts = [stop.text(row[begin:end].tolist(), done, special=True) for row, begin, end, done in ends]
        return rewards.score(RewardBatch.from_rollout(rollout, texts))

    roles = Roles(
        PolicyRole(actor, args.temperature, infer_rows, budget),
        None if reference is None else PolicyRole(reference, args.temperature, infer_rows, budget),
        None if critic is None else ValueRole(critic, infer_rows, budget),
        reward_role,
    )
    return PPOTrainer(
        args,
        world,
        roles,
        score,
        generator,
        data.train,
        data.eval_prompts,
        data.ptx,
        sizes,
        save_extras,
        argv,
        running_normalization,
        residency,
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
