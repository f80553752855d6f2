"""The model: what the stages rely on is proven before any of them runs."""

from salmon.config import Model
from salmon.configuration import texts_of

# Of the default run; another run's own the job itself looks at.
PPO = texts_of(settings.ppo)

# What a part of the check reads is what its stages read, and no more: it runs again just where they would anyway.
PARTS = {
    "sampling": {"model": settings.model, "policy_prompt": settings.policy_prompt, "sampling": settings.sampling},
    "judging": {"model": JUDGE_MODEL, "judge": settings.judge},
    "training": {
        "model": settings.model.without_adapter(),
        "tokenizer": Model.model_validate_json(TOKENIZER),
        "lora": settings.lora,
        "scoring": settings.scoring,
    },
    "rl": {
        "model": settings.model,
        "policy-prompt": settings.policy_prompt,
        "lora": settings.lora,
        "scoring": settings.scoring,
        "ppo": PPO,
    },
}


rule check_model:
    input:
        lambda wildcards: {
            "sampling": [*initial_policy(), *settings.policy_prompt.files],
            "judging": [*judge_model(), settings.judge.template, settings.judge.principles],
            "training": [*files_of(settings.model.base), *files_of(own_tokenizer(), tokenizer_files)],
            "rl": [*initial_policy(), *settings.policy_prompt.files, PPO.template],
        }[wildcards.part],
    output:
        directory("<results>/check_model/{part}"),
    log:
        "<logs>/check_model/{part}.log",
    benchmark:
        "<benchmarks>/check_model/{part}.tsv"
    wildcard_constraints:
        part="|".join(PARTS),
    priority: 100  # a refusal comes before the first long job
    conda:
        "../envs/model.yaml"
    threads: 8
    resources:
        device="auto",
        free=lambda wildcards: free(**PARTS[wildcards.part]),
    params:
        parts=lambda wildcards: json.dumps([wildcards.part]),
        sections=lambda wildcards: [
            word
            for name, section in PARTS[wildcards.part].items()
            for word in (f"--{name.replace('_', '-')}", deciding(section))
        ],
    shell:
        f"python {SCRIPTS}/check_model.py"
        " --output {output:q} --parts {params.parts:q} {params.sections:q}"
        " {resources.free}"
        " --device {resources.device:q} > {log:q} 2>&1"
