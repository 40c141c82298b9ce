"""A policy of one's own: in every block the modules that move most, so that no block stops learning."""

from collections import Counter

from atoll.registry.options import Options as PartOptions
from atoll.selection.schedule import Schedule, window_steps


class Spread:
    """[select] policy = "spread:Spread"."""

    repeats = True

    class Options(PartOptions):
        per_block: int = 1
        """Modules that stay active in every block."""

    def __init__(self, options):
        self.per_block = options.per_block

    def measures(self, select):
        return select.variation

    def schedule(self, select, epoch_steps):
        return Schedule.periodic(window_steps(select, epoch_steps), epoch_steps if select.every == "epoch" else select.every)

    def choose(self, pool, scores, choice):
        seen = Counter()  # by block, from the module that moves most
        order = sorted(pool, key=lambda module: -scores[module.name])
        return [module.name for module in order if seen.update([module.place[0]]) or seen[module.place[0]] <= self.per_block]
