"""The demo suite: our own items in the schema of the benchmarks they stand for, and lm-eval's definitions of them.

Written for this project, so that every installation can be scored in seconds and offline. Too few and too easy to
compare models by.

=================  =====================  ===========================================
task               in the manner of       asks
=================  =====================  ===========================================
demo_choice        ARC                    a question with four answers
demo_boolean       BoolQ                  yes or no about a short passage
demo_physical      PIQA                   which of two ways reaches a goal
demo_perplexity    WikiText               likelihood of held-out text of the mixture
=================  =====================  ===========================================
"""
