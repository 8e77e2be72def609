"""Tasks: what is trained on the engine. MoCo is the first one, sentences are another.

A task is a class with four methods:

    build_data(device)     batches: steps_per_epoch, facts, set_epoch(epoch, start), iter, end()
    build_module()         the nn.Module, on the CPU
    losses(model, batch, part, parts)
                           named terms of a batch, as moco.train.losses.Losses has them
    total(losses)          the scalar to minimise

The engine (`moco.train.loop.train`) gives it the loop, resumption, saving, guards, logs and
processes. Everything else has a default in `moco.train.task.Task`: what a checkpoint holds beside
the weights, start-up facts, metrics and histograms for the log, an evaluation every few epochs. A
task may use `moco.train` and `moco.evaluate`; the engine knows no task. docs/own_task.md has an
example of 60 lines.
"""
