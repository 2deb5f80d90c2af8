"""How β is chosen before training, from scores of the reference's own responses.

Start with `frontier.py`: KL, score and β of the optimal policy, with bootstrap intervals.

    tilting.py         reference samples weighted by exp(score / β), with the jackknife
    frontier.py        the optimum at given βs, or at the β that spends a given KL
    initial_beta.py    where a β that follows a target starts, and why

May import `kl` and `kl.control`; draws no samples and writes no files.
"""
