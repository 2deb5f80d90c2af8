"""Distances between a policy and its reference, in nats: exact, estimated, penalised, controlled.

Start with `estimators.py` (k1, k2, k3) and `placements.py` (where the KL is penalised, and which
gradient that has).

    exact.py, discrete.py    divergences of whole distributions
    control_variate.py       the coefficient of the placement `mixed`
    statistics.py            means and standard errors, clustered by prompt
    position_bins.py         bins of positions in a response
    control/                 how β moves;   planning/    how β is chosen before training

Functions of tensors and numbers: may import `masked`, `types` and `errors`, nothing above.
"""
