"""Tables of training_step.py's runs with all competitors, of scaling.py's and of retrieval.py's."""

from __future__ import annotations

from accuracy_tables import MISSING, Run
from competitors import COMPETITORS


def peers(runs: list[Run]) -> str:
    """Every competitor's step on each problem, and how many of it the quickest exact float32 one lasts."""
    texts = []
    for run in runs:
        arguments, results = run["arguments"], run["results"]
        exact = [values["median"] for name, values in results.items() if COMPETITORS[name].exact and values["median"]]
        outputs = f"{int(arguments['outputs']):,} planted outputs" if arguments["problem"] == "planted" else ""
        title = f"{outputs or arguments['problem']}, batch {arguments['batch_size']}"
        lines = [f"| {title} | ms a step | quartiles | speed-up |", "|---|---|---|---|"]
        for name, values in results.items():
            if not values["median"]:
                lines.append(f"| {name} | {values.get('reason', MISSING)} | | |")
                continue
            median, low, high = (values[key] * 1e3 for key in ("median", "low", "high"))
            lines.append(
                f"| {name} | {median:,.1f} | {low:,.1f} - {high:,.1f} | {min(exact) / values['median']:.1f}x |"
            )
        texts.append("\n".join(lines))
    return "\n\n".join(texts) or MISSING


def scaling(runs: list[Run]) -> str:
    """Step time, its parts, memory and recall over the number of outputs."""
    texts = []
    for run in runs:
        arguments = run["arguments"]
        active = arguments["num_active"]
        title = f"{arguments['method']}, {'LSHConfig.auto' if active == 'None' else f'num_active {int(active):,}'}"
        lines = [
            f"| {title}: outputs | threads | ms a step | finding candidates | tables / weights "
            "| peak / (weights + moments) | peak, GB | dense top-1 found | top-10 found |",
            "|" + "---|" * 9,
        ]
        for row in run["scaling"]:
            if "failed" in row:
                lines.append(f"| {row['outputs']:,} | {row['threads']} | {row['failed']} |" + " |" * 6)
                continue
            lines.append(
                f"| {row['outputs']:,} | {row['threads']} | {row['step']['mean'] * 1e3:.1f} "
                f"| {row['finding_share']:.1%} | {row['table_bytes_per_weight_byte']:.1%} "
                f"| {row['peak_per_weights_and_moments']:.2f} | {row['peak_bytes'] / 1e9:.2f} "
                f"| {row['recall@1']:.2f} | {row['recall@10']:.2f} |"
            )
        if len({row["outputs"] for row in run["scaling"]}) > 1:
            lines += ["", f"The mean step grows as N^{run['slope']:.2f}."]
        texts.append("\n".join(lines))
    return "\n\n".join(texts) or MISSING


def retrieval(runs: list[Run]) -> str:
    """What retrieval.py found of each query on trained layers, a table for each layer."""
    parts = []
    for run in runs:
        for epochs in dict.fromkeys(row["epochs"] for row in run["retrieval"]):
            rows = [row for row in run["retrieval"] if row["epochs"] == epochs]
            first = rows[0]
            parts += [
                f"{run['arguments']['problem']}, {first['neurons']:,} outputs, after {epochs:g} of "
                f"{run['arguments']['epochs']} epochs, {first['candidates']:,.0f} candidates of each query's own; as "
                f"many hold {first['best_mass']:.3f} of the softmax at best:\n",
                "| candidates | dense top-1 found | top-10 | softmax mass | of the best | us a query | rehash, s |",
                "|---|---|---|---|---|---|---|",
                *(
                    f"| {row['option']} | {row['recall']['1']:.3f} | {row['recall']['10']:.3f} | {row['mass']:.3f} "
                    f"| {row['mass'] / row['best_mass']:.2f} | {row['microseconds_a_query']:,.0f} "
                    f"| {row['rehash_seconds']:.2f} |"
                    for row in rows
                ),
                "",
            ]
    return "\n".join(parts).strip()
