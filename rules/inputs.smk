"""Inputs and parameters for the rules of single stages; `common.smk` has those that several stages need."""

# ---- The check of the model ---------------------------------------------------------------------------------------


@cache
def checked_sections(run):
    """Part of the check -> its sections, exactly those of its stages, so it reruns only when they would anyway."""
    config = RUNS[run]
    training = {"lora": config.lora, "scoring": config.scoring}
    return {
        "sampling": {
            "model": config.model,
            "policy_prompt": config.policy_prompt,
            "sampling": config.sampling.model_copy(update={"paths": None}),
        },
        "judging": {"model": plan.judge_model(config), "judge": config.judge.model_copy(update={"path": None})},
        "training": {
            "model": config.model.without_adapter(),
            "tokenizer": PLAN.tokenizer(run),
            **training,
        },
        "rl": {
            "model": config.model,
            "policy_prompt": config.policy_prompt,
            **training,
            "ppo": configuration.texts_of(config.ppo),
        },
    }


def checked_files(wildcards):
    """Input: the files that a part of the check reads."""
    run, config = run_name(wildcards), run_settings(wildcards)
    return {
        "sampling": [*initial_policy(run), *config.policy_prompt.files],
        "judging": [*judge_model(run), config.judge.template, config.judge.principles],
        "training": base_model(run),
        "rl": [*initial_policy(run), *config.policy_prompt.files, config.ppo.template],
    }[wildcards.part]


# ---- Imports ------------------------------------------------------------------------------------------------------


def config_file(folder):
    """The file that describes a model's layers, as a list for `files_of`."""
    return [folder / "config.json"]


@cache
def base_settings(run):
    """The settings that an imported reward model is checked against."""
    return provenance.base_of(RUNS[run].model).model_dump_json(exclude_unset=True)


def response_files(wildcards):
    """The two imported response files, as an option."""
    return ["--responses", json.dumps(run_settings(wildcards).sampling.paths)]


# ---- Evaluation ---------------------------------------------------------------------------------------------------


def trained_tables(wildcards):
    """Input: tables with everything that the runs train on, by option of `clean_evaluation_prompts`."""
    return {option: [in_results(path) for path in paths] for option, paths in PLAN.trained().items()}


def evaluation_pairs(wildcards):
    """Input: the pairs that a reward model is tested on, if any."""
    return artifact("evaluation_pairs")(wildcards) if run_settings(wildcards).evaluation.pairs else []


def measuring(wildcards, name):
    """Input: the records that the run's reward model was trained on, if known, or what else measures it on them."""
    path = PLAN.measuring(run_name(wildcards), name)
    return in_results(path) if path else []


def measuring_judge(wildcards):
    """Parameter: the section of the judge for measurements."""
    return deciding(plan.measuring_judge(run_settings(wildcards)), without=("model",))


def measuring_options(wildcards, input):
    """Parameter: the inputs that a reward model is tested on, if they exist, as options."""
    given = {name: input.get(name) or None for name in ("records", "preferences", "pairs")}
    if pmp_data := input.get("pmp_data"):
        given |= {"pmp-data": pmp_data, "pmp": deciding(run_settings(wildcards).pmp)}
    return options(**given)


def opponents_answers(wildcards):
    """Input: the answers of the other run that the judge compares with the answers of the job's run."""
    run, other = run_name(wildcards), wildcards.other
    if (run, other) not in PLAN.versus():
        found = ", ".join(f"{one} with {two}" for one, two in PLAN.versus()) or "no runs"
        raise WorkflowError(
            f"the judge does not compare {run} with {other}; by evaluation.against, it compares {found}"
        )
    return in_results(PLAN.path(other, "answers"))


def labelled_pairs(wildcards):
    """Input: judgements of pairs that people compared, and the outputs that people prefer, if there are any."""
    names = ("judged_pairs", "preferred_outputs") if run_settings(wildcards).evaluation.judge_pairs else ()
    return {name: artifact(name)(wildcards) for name in names}


def scorers_input(wildcards):
    """Input: all reward models of the runs, and the files needed to score texts with them."""
    owners = [scorer["name"] for scorer in PLAN.scorers()]
    return {
        "reward_models": [in_results(PLAN.path(run, "reward_model")) for run in owners],
        "principles": [RUNS[run].judge.principles for run in owners],
        "rl_principles": [file for scorer in PLAN.scorers() for file in scorer["rl_principles"]],
        "templates": [RUNS[run].reward_model.template for run in owners],
        "model": [file for run in owners for file in base_model(run)],
    }


def scorers_settings():
    """Parameter: the reward models of `scorers_input` with their sections."""
    settings_of = lambda value: value.deciding() if isinstance(value, Section) else value
    return to_json([{name: settings_of(value) for name, value in one.items()} for one in PLAN.scorers()]).decode()


def task_prompt(wildcards):
    """Parameter: the part of the policy's prompt that decides how tasks are asked."""
    config = run_settings(wildcards)
    return deciding(TaskPrompt.of(config.policy_prompt, config.evaluation.tasks_format))


# ---- The report ---------------------------------------------------------------------------------------------------


def pictures_and_tables(folder, caption, category, of_run=True):
    """Output: a folder whose figures and tables appear in Snakemake's report.

    Args:
        folder: path of the folder.
        caption: file in rules/captions.
        category: category in the report.
        of_run: whether the folder shows a single run, which then becomes its subcategory.
    """
    return report(
        directory(folder),
        patterns=["{what}.{kind,svg|html}"],
        caption=f"captions/{caption}.rst",
        category=category,
        subcategory=run_name if of_run else "all runs",
        labels={"shown": "{what}"},
    )


def drawn(name):
    """Input: the artifacts that a part of the report shows."""
    return lambda wildcards: [in_results(path) for _, _, path in PLAN.drawn(run_name(wildcards), name)]


def drawn_parts(name):
    """Input: the artifacts of one run that a part of the report shows, by option of its script."""

    def option(artifact):
        return (
            "measured" if artifact.endswith("_evaluation") else "preferences" if artifact == "preferences" else "model"
        )

    return lambda wildcards: {option(one): in_results(path) for one, _, path in PLAN.drawn(run_name(wildcards), name)}


def shown_option(wildcards, input):
    """Parameter: the inputs of `drawn_parts` as options."""
    return " ".join(f"--{name} {shlex.quote(path)}" for name, path in input.items() if name != "home")


# ---- The demo -----------------------------------------------------------------------------------------------------


# Files that `make_demo_data` writes, without its manifest.
DEMO_DATA = ["oasst1.jsonl", "shp.jsonl", "hh_rlhf.jsonl", "openorca.parquet", "sharegpt.json", "sharegpt_90k.json"]
DEMO_DATA += ["dolly.jsonl", "math.jsonl", "held_out.jsonl"]


def demo_world(wildcards):
    """An empty input that refuses other data: the oracles can only measure texts of the demo's world."""
    made = {f"{settings.pathvars.results}/data/{file}" for file in DEMO_DATA}
    if settings.judge.model:
        raise WorkflowError("the demo's evaluation needs the initial policy as the judge; set judge.model to null")
    for run, config in RUNS.items():
        for key in ("model", "policy_prompt", "lora", "scoring", "judge"):
            if getattr(config, key).deciding() != getattr(settings, key).deciding():
                raise WorkflowError(
                    f"the demo's evaluation needs the same {key} in all runs; remove {key} from runs.{run}"
                )
        for name, source in config.prompts.sources.items():
            if foreign := sorted(set(source.paths) - made):
                key = f"prompts.sources.{name}.path" if run == "default" else f"runs.{run}.prompts.sources.{name}.path"
                raise WorkflowError(
                    f"the demo's oracles can only measure the demo's world, but {key} is {foreign[0]}, outside of it; "
                    "use the target `evaluation` instead of `demo_evaluation`"
                )
    return []
