"""An aggregation rule of one's own: every edge counts the same, however many rows it has."""

from atoll.adapters.low_rank import row_length
from atoll.federated.aggregation.sums import ProductSum


class EqualVotes:
    """[federated] aggregation = "equal_votes:EqualVotes"."""

    works_on_products = True  # federated.clip_update goes with it
    sends_best_rank = True  # an edge of smaller rank is sent the best approximation

    def begin(self, module):
        return Votes(module)


class Votes:
    def __init__(self, module):
        self.module, self.products, self.lengths = module, ProductSum(module.old.size), []

    def add(self, adapter, weight, sent):
        self.products.add(adapter, 1.0)
        self.lengths.append(row_length(adapter.down_RI))

    def finish(self):
        return self.module.cut(self.products.mean_product(), self.lengths)
