"""How batch statistics enter the moving ones."""

from ..case import evaluate, set_state, train, valid

PURPOSE = "the moving average: decay, cumulative average, several steps, the counter"

_FAR = {"moving_mean": [5.0, -3.0, 0.5], "moving_variance": [4.0, 0.25, 9.0]}

CASES = [
    *(
        valid(
            f"decay-{decay}-steps-{steps}",
            "decay weighs the OLD statistics; eval afterwards reads what training left.",
            {"decay": decay},
            *[train(dy=False) for _ in range(steps)],
            evaluate(),
            state=_FAR,
        )
        for decay in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
        for steps in (1, 3)
    ),
    *(
        valid(
            f"eval-after-{steps}-steps",
            "From the initial statistics, with eval after every count that hides another mistake.",
            {"decay": 0.99, "moving_variance_estimator": estimator},
            *[train(dy=False) for _ in range(steps)],
            evaluate(),
            state="initial",
        )
        for steps, estimator in ((1, "biased"), (2, "unbiased"), (10, "biased"))
    ),
    *(
        valid(
            f"cumulative-{estimator}-steps-{steps}",
            "The plain average over all updates: the first replaces whatever was there.",
            {"decay": "cumulative", "moving_variance_estimator": estimator},
            *[train(dy=False) for _ in range(steps)],
            evaluate(),
            state=_FAR,
        )
        for estimator in ("biased", "unbiased")
        for steps in (1, 2, 10)
    ),
    valid("cumulative-goes-on", "An average that starts at a counter of 9 weighs the next batch 1/10.",
          {"decay": "cumulative"}, train(), evaluate(), state={**_FAR, "num_updates": 9}),
    valid("counter-goes-on", "The counter counts on from where another framework stopped.",
          {}, train(), train(dy=False), state={"num_updates": 41}),
    valid("counter-is-set", "A counter set between steps decides the next weight of a cumulative average.",
          {"decay": "cumulative"}, train(dy=False), set_state(num_updates=3), train(dy=False), evaluate()),
    valid("decay-0-far", "decay 0 is the batch's statistics exactly, however far the old ones were.",
          {"decay": 0.0}, train(), state={"moving_mean": [1e6, -1e6, 1e7], "moving_variance": [1e8, 1e6, 1e7]}),
    valid("decay-1-far", "decay 1 is the old statistics exactly.",
          {"decay": 1.0}, train(mean=1e5), state=_FAR),
    valid("decay-0.999", "A small weight on the new must not be rounded before it is used.",
          {"decay": 0.999}, train(mean=100.0, std=30.0), train(mean=100.0, std=30.0), evaluate(), state="initial"),
]  # fmt: skip
