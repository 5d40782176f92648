"""What selection can ask of a scored answer, each a formula over the columns of `scores`.

With s_t and b_t the log-probabilities (nats) of the answer's token t under specialist and base,
x the prompt and n the answer's tokens:

    gap              mean(s_t − b_t) = ln(PPL_base / PPL_specialist)       TuneShift-KD §3
    controlled_gap   gap less what a line through the controls' gaps, over ln n, gives for its n
    content_gap      mean of s_t − b_t, token weights ln(N / answers that hold it) of N answers
    confidence       mean(s_t) = −ln PPL_specialist
    weakest_token    min(s_t): one doubtful token makes the answer doubtful
    surprise         −mean(b_t) = ln PPL_base
    quotient         ln PPL_base / ln PPL_specialist
    likeness         of the prompt alone: mean over its character trigrams of
                     ln P(trigram | seeds) − ln P(trigram | controls), each count plus a half and
                     without the prompt's own (Moore & Lewis, ACL 2010, on trigrams)
    target_weakness  −mean of the target's log-probabilities of the same answer: what it knows
                     already is not worth training on; asks for score.target
    random           uniform in [0, 1), by a hash of prompt and seed: a control of the selection

All but likeness and random are of the answer given the prompt. The perplexity of the *prompt*,
which popular accounts of the method name, points the other way (docs/decisions/0021).
"""

from collections.abc import Collection

from stillhouse.configs.select import Signal

# Over `answered`: one row an answer, of this round, the seeds and the controls; parameter $seed.
_FORMULAS: dict[Signal, str] = {
    "gap": "gap",
    "controlled_gap": "gap - slope * (ln(tokens) - size) - level",
    "content_gap": "content_gap",
    "confidence": "confidence",
    "weakest_token": "list_min(logp_specialist)",
    "surprise": "gap - confidence",
    # A specialist without any doubt would divide by nothing.
    "quotient": "(gap - confidence) / greatest(-confidence, 1e-6)",
    "likeness": "likeness",
    "target_weakness": "-target_confidence",
    "random": "md5_number_lower(prompt_id || '/' || $seed) / 18446744073709551616.0",
}

# Through the controls' means. Where all are of one length, they say nothing of another.
_LINE = """, line AS (
    SELECT avg(ln(tokens)) AS size, avg(gap) AS level,
        CASE WHEN min(tokens) < max(tokens) THEN regr_slope(gap, ln(tokens)) ELSE 0 END AS slope
    FROM answered WHERE role = 'control' AND finish <> 'length'
)"""
_CONTENT = """, pieces AS (
    SELECT completion_id, unnest(token_ids) AS token,
        unnest(logp_specialist)::DOUBLE - unnest(logp_base)::DOUBLE AS excess FROM answered
), rare AS (
    SELECT token, ln((SELECT count(*) FROM answered) / count(DISTINCT completion_id)) AS weight
    FROM pieces GROUP BY token
), content AS (
    SELECT completion_id, fsum(weight * excess) / nullif(fsum(weight), 0) AS content_gap
    FROM pieces JOIN rare USING (token) GROUP BY completion_id
)"""
_LIKENESS = """, written AS (
    SELECT completion_id, role, ' ' || lower(prompt_text) || ' ' AS line FROM answered
), trigrams AS (
    SELECT completion_id, role, gram, count(*) AS times FROM (
        SELECT completion_id, role,
            unnest(list_transform(range(1, length(line) - 1),
                lambda begin: line[begin:begin + 2])) AS gram
        FROM written
    ) GROUP BY ALL
), sides AS (
    SELECT gram, coalesce(sum(times) FILTER (role = 'seed'), 0) AS in_seeds,
        coalesce(sum(times) FILTER (role = 'control'), 0) AS in_controls
    FROM trigrams GROUP BY gram
), sizes AS (
    SELECT sum(in_seeds) AS seeds, sum(in_controls) AS controls,
        1 + count(*) FILTER (in_seeds + in_controls > 0) AS kinds
    FROM sides
), own AS (
    SELECT completion_id, sum(times) AS own FROM trigrams GROUP BY completion_id
), likened AS (
    SELECT completion_id, fsum(times * (
        ln((in_seeds - CASE role WHEN 'seed' THEN times ELSE 0 END + 0.5)
            / (seeds - CASE role WHEN 'seed' THEN own ELSE 0 END + 0.5 * kinds))
        - ln((in_controls - CASE role WHEN 'control' THEN times ELSE 0 END + 0.5)
            / (controls - CASE role WHEN 'control' THEN own ELSE 0 END + 0.5 * kinds))
    )) / any_value(own) AS likeness
    FROM trigrams JOIN sides USING (gram) JOIN own USING (completion_id) CROSS JOIN sizes
    GROUP BY completion_id
)"""


def measured(signals: Collection[Signal]) -> str:
    """The common table expressions that end with `measured`: `answered` and a column a signal.

    `answered` must stand before. Only what is asked for is computed.
    """
    columns = ", ".join(f"({_FORMULAS[name]})::DOUBLE AS signal_{name}" for name in sorted(signals))
    extra, joins = "", ""
    if "controlled_gap" in signals:
        extra, joins = extra + _LINE, joins + " CROSS JOIN line"
    if "content_gap" in signals:
        extra, joins = extra + _CONTENT, joins + " LEFT JOIN content USING (completion_id)"
    if "likeness" in signals:
        extra, joins = extra + _LIKENESS, joins + " LEFT JOIN likened USING (completion_id)"
    return f"{extra}, measured AS (SELECT answered.*, {columns} FROM answered{joins})"
