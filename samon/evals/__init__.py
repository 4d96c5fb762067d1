"""Evaluations: name on the command line -> module of this package whose `rows` makes its result rows."""

EVALS = {
    "accuracy": "accuracy",
    "apgd": "attacks",
    "sharpness": "sharpness",
    "feature_rank": "feature_rank",
    "norm_params": "norm_params",
}
