"""The engine: a step and what it leaves behind, stages, samples and their order, several processes."""

from ..mutant import Mutant, of

T = "python_tests/training"
STEP = (f"{T}/test_step.py", f"{T}/test_task.py")
TRAINER = (f"{T}/test_optimisation.py", f"{T}/test_trainer.py", f"{T}/test_switches.py", f"{T}/test_epochs.py")
RESUME = (f"{T}/test_resume.py", "-m", "not slow", "-k", "stopped_anywhere or workers_change")
SEVERAL = (f"{T}/test_several_processes.py",)
JOBS = (f"{T}/test_jobs_that_fail.py", "-m", "not slow", "-k", "killed_process or not_see or another_number or sigterm")
NAMED = (f"{T}/test_killed_at_named_points.py",)
STAGES = (f"{T}/test_stages.py", f"{T}/test_pipeline_of_four_stages.py")
SAMPLING = (f"{T}/test_sampling.py", f"{T}/test_switches.py")

MUTANTS = [
    *of(
        "fgvc_ext/training/step.py",
        Mutant("step-buffers-stay", "buffer.copy_(torch.where(usable, buffer, old))", "pass"),
        Mutant("step-taken-all-the-same", "(~usable).float()", "torch.zeros_like(usable).float()"),
        Mutant("step-sums-of-skipped", "torch.where(usable, value, torch.zeros_like(value))", "value"),
        Mutant("step-average-not-updated", "self.average.update(self.task, usable)", "pass"),
        Mutant(
            "step-average-always",
            "self.average.update(self.task, usable)",
            "self.average.update(self.task, usable | True)",
        ),
        Mutant("step-share-of-a-part", "loss * (len(sizes) * n / total)", "loss / len(pieces)", tests=TRAINER),
        Mutant("step-logs-not-added", "add_sums(sums, logs)", "sums.update(logs)"),
        Mutant("step-loss-of-a-sample", "loss.detach().double() * n", "loss.detach().double()", tests=TRAINER),
        Mutant("step-not-clipped", "if self.optim.clip_grad_norm is not None:", "if False:"),
        Mutant("step-gradients-unlooked", "is not None]).isfinite()", "is not None]).isfinite() | True"),
        Mutant("step-scaled", "self.scaler.unscale_(self.optimizer)", "pass"),
        Mutant("step-scale-never-changes", "self.scaler.update()", "pass"),
        Mutant(
            "step-schedule-stands",
            "self.scaler.update()\n        self.scheduler.step()",
            "self.scaler.update()",
            tests=STEP,
        ),
        Mutant("step-precision-ignored", 'enabled=self.precision != "fp32"', "enabled=False"),
        Mutant(
            "step-not-compiled", "torch.compile(self.parallel) if engine.compile else self.parallel", "self.parallel"
        ),
        Mutant("step-gradients-kept", "self.optimizer.zero_grad(set_to_none=True)", "pass"),
        Mutant("step-whole-batch-accumulated", "if self.optim.accumulate > 1 and whole:", "if False:"),
        Mutant("step-left-out-parameters", "p.requires_grad and id(p) not in known", "False"),
        Mutant("step-unused-parameters", "p.requires_grad and p.grad is None", "False", tests=TRAINER),
        Mutant(
            "step-nan-of-one",
            "distributed.all_true(loss.isfinite())",
            "loss.isfinite()",
            tests=(f"{T}/test_processes_agree.py", "-k", "nan_of_one"),
        ),
        Mutant(
            "step-scaler-forgotten",
            '"scheduler", "scaler", "health")',
            '"scheduler", "scaler")',
            tests=(f"{T}/test_epochs.py", f"{T}/test_step.py"),
        ),
        Mutant("step-nothing-is-nan", "if n == 0:", "if False:", tests=SEVERAL),
        Mutant("step-ranks-weigh-alike", "(len(sizes) * n / total)", "(n / max(1, own))", tests=SEVERAL),
        Mutant(
            "step-buffers-of-each-rank",
            "distributed.share_buffers(self.task)",
            "pass",
            tests=(f"{T}/test_processes_agree.py", "-k", "buffers"),
        ),
        tests=STEP,
    ),
    *of(
        "fgvc_ext/training/health.py",
        Mutant("health-row-never-ends", "torch.where(usable & ~failed, 0.0,", "torch.where(usable & failed, 0.0,"),
        Mutant("health-fp16-never-fails", "& (scale >= 1)", "& (scale >= 0)"),
        Mutant("health-last-of-the-row", "begins = bad & (self._in_a_row == 0)", "begins = bad & ~failed"),
        Mutant("health-one-too-many", "if in_a_row <= self.allowed:", "if in_a_row <= self.allowed + 1:"),
        tests=STEP,
    ),
    *of(
        "fgvc_ext/training/optimisation.py",
        Mutant("optim-momentum-from-nothing", "if config.momentum:", "if False:", tests=STEP),
        Mutant("optim-nesterov-ignored", "nesterov=config.nesterov,", "", tests=TRAINER),
        Mutant(
            "optim-average-of-the-beginning",
            "torch.where(self.updates == 0, 1.0,",
            "torch.where(self.updates < 0, 1.0,",
            tests=TRAINER,
        ),
        Mutant("optim-average-buffers", "copied.copy_(buffer)", "pass", tests=TRAINER),
        Mutant("optim-cosine-ends-early", "T_max=max(1, steps - warmup)", "T_max=max(1, steps)", tests=TRAINER),
        Mutant("optim-adamw-betas", "betas=config.betas, ", "", tests=STEP),
    ),
    *of(
        "fgvc_ext/training/trainer.py",
        Mutant(
            "trainer-epoch-not-told",
            "task.start_epoch(self.at.epoch)",
            "pass",
            tests=(f"{T}/test_task.py", f"{T}/test_epochs.py"),
        ),
        Mutant("trainer-sums-not-added", "add_sums(self.at.sums, self.step(", "self.at.sums.update(self.step("),
        Mutant("trainer-health-unlooked", "if found.failed_at is not None:", "if False:"),
        Mutant("trainer-skips-uncounted", "found.skipped - self._found.skipped", "0"),
        Mutant(
            "trainer-saves-what-failed", '        self._check_health()\n        own = {"sums"', '        own = {"sums"'
        ),
        Mutant("trainer-best-of-the-last", "sign * value > sign * best", "sign * value >= sign * best"),
        Mutant("trainer-lower-is-better", "sign = 1 if self.task.higher_is_better else -1", "sign = 1", tests=STAGES),
        Mutant("trainer-best-not-kept", 'if name == "val":', "if False:"),
        Mutant(
            "trainer-layout-ignored",
            "layout = self.engine.channels_last\n        return",
            "layout = False\n        return",
        ),
        Mutant("trainer-never-looks", "if self.at.step % self.look_every == 0:", "if False:"),
        Mutant("trainer-found-not-restored", "self._found = self.step.look()", "pass"),
        Mutant("trainer-overflows-uncounted", "found.overflows - self._found.overflows", "0"),
        Mutant("trainer-no-batch-of-one", "min(2, self.training.optim.batch_size)", "2"),
        Mutant(
            "trainer-crops-of-a-batch", "self.engine.eval_batch_size // samples.crops", "self.engine.eval_batch_size"
        ),
        Mutant("trainer-best-of-any", "if name in self.training.evaluations and better:", "if better:"),
        Mutant("trainer-nan-is-best", "math.isnan(best) or ", ""),
        Mutant("trainer-step-left-out", "self.step.leave_out()", "pass"),
        Mutant(
            "trainer-shared-statistics",
            "if self.engine.sync_batch_norm:",
            "if False:",
            tests=(f"{T}/test_processes_agree.py", "-k", "batch_norm"),
        ),
        Mutant(
            "trainer-dropout-alike",
            'f"random numbers of process {rank}"',
            '"initial weights"',
            tests=(f"{T}/test_processes_agree.py", "-k", "nan_of_one"),
        ),
        Mutant(
            "trainer-sums-of-others-lost",
            "for state in states if process.is_main else []:",
            "for state in []:",
            tests=(f"{T}/test_processes_agree.py", "-k", "no_more"),
        ),
        Mutant("trainer-average-not-told", "if self.step.average is not None else []", "if False else []"),
        Mutant(
            "trainer-epoch-before-mode",
            "self.task.train()\n                self._start_epoch()",
            "self._start_epoch()\n                self.task.train()",
        ),
        Mutant("trainer-balanced-ignored", "if training.optim.balanced else None", "if False else None"),
        Mutant("trainer-random-not-restored", 'restore_random_state(own["random"])', "pass", tests=RESUME),
        Mutant(
            "trainer-sums-not-restored",
            'value.to(self.device) for name, value in own["sums"].items()',
            "value for name, value in {}.items()",
            tests=RESUME,
        ),
        Mutant("trainer-lines-stay", "self.run.metrics.drop(self.name, after=self.at.epoch)", "pass", tests=NAMED),
        Mutant(
            "trainer-another-configuration",
            'if state["config_hash"] != self.training.metadata["config_hash"]:',
            "if False:",
            tests=(f"{T}/test_resume.py", "-m", "not slow"),
        ),
        Mutant("trainer-no-images", 'sample["image"][None, ...][:0]', 'sample["image"][None, ...]', tests=SEVERAL),
        Mutant(
            "trainer-frozen-stay",
            "frozen.to(self.device, layout)",
            "pass",
            tests=(f"{T}/test_task.py", f"{T}/test_pipeline_with_teachers.py"),
        ),
        tests=TRAINER,
    ),
    *of(
        "fgvc_ext/training/sampling.py",
        Mutant("sampling-one-order", '"order of epoch {epoch}"', '"order of an epoch"'),
        Mutant(
            "sampling-seed-of-the-run",
            "mix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(epoch)",
            "mix64(np.array([seed % 2**64], np.uint64))",
        ),
        Mutant("sampling-single-left-over", "full + (rest > (1 if self.batch_size > 1 else 0))", "full + (rest > 0)"),
        Mutant(
            "sampling-balanced-alike",
            "place = order.numpy() if self.labels is None else",
            "place = order.numpy() if True else",
        ),
        Mutant("sampling-evaluation-drops", "range(0, len(keys), batch_size)", "range(0, len(keys) - 1, batch_size)"),
        Mutant("sampling-parts-of-one", "min(count, n // 2)", "min(count, n)"),
        tests=SAMPLING,
    ),
    *of(
        "fgvc_ext/training/distributed.py",
        Mutant("several-no-gradients", "return DistributedDataParallel(task, **options)", "return task"),
        Mutant(
            "several-padded", "return range(self.rank, count, self.world_size)", "return range(0, count)", tests=TRAINER
        ),
        Mutant(
            "several-sums-of-one",
            "total[name] = total[name] + value if name in total else value",
            "total[name] = value",
        ),
        Mutant(
            "several-rows-in-blocks",
            "whole[rank :: len(parts)] = part",
            "whole[rank * len(part) : (rank + 1) * len(part)] = part",
            tests=(f"{T}/test_processes_agree.py", "-k", "rows"),
        ),
        Mutant(
            "several-attempts-share",
            "process.restarts}",
            "0",
            tests=JOBS,
            survives="Whether a restart meets the addresses of dead processes is luck: some come back without it.",
        ),
        Mutant(
            "several-main-has-nothing",
            "-(-count * rank // self.world_size)",
            "(count * rank // self.world_size)",
            tests=(f"{T}/test_trainer.py", "-k", "processes"),
        ),
        Mutant("several-failures-unheard", "if others :=", "if False and", tests=JOBS),
        tests=SEVERAL,
    ),
    *of(
        "fgvc_ext/training/evaluation.py",
        Mutant("evaluation-in-training-mode", "task.eval()", "pass", tests=TRAINER),
        Mutant("evaluation-mode-not-put-back", "task.train(training)", "pass", tests=TRAINER),
        Mutant(
            "evaluation-sums-in-half",
            "torch.float64 if value.is_floating_point() else torch.int64",
            "value.dtype",
            tests=(f"{T}/test_trainer.py", f"{T}/test_step.py"),
            survives="Sums of a few float32 losses agree to the digits that tests may demand.",
        ),
        Mutant("evaluation-unseen-sums", "if name not in watched.seen and", "if False and", tests=STEP),
    ),
    *of(
        "fgvc_ext/training/stages.py",
        Mutant("stages-inputs-forgotten", '{f"result of {name}": result.sha256 for', '{f"result of {name}": "" for'),
        Mutant("stages-last-allowed", ' or stage.name == "last"', ""),
        Mutant("stages-always-done-again", "if not distributed.on_main(run.is_done, stage.name):", "if True:"),
        Mutant("stages-stale-goes-on", "if lines := refusals(", "if lines := [] and refusals("),
        Mutant("stages-precision-forgotten", "if began_with is None:", "if True:", tests=TRAINER),
        Mutant(
            "stages-asked-alone",
            "if distributed.any_process(asked.received is not None)",
            "if (asked.received is not None)",
            tests=(f"{T}/test_processes_agree.py", "-k", "asked"),
        ),
        Mutant("stages-first-ships", "models[-1].path.read_bytes()", "models[0].path.read_bytes()"),
        tests=STAGES,
    ),
    *of(
        "fgvc_ext/training/teachers.py",
        Mutant(
            "teachers-in-training-mode",
            "return self.module.eval()(*args, **kwargs)",
            "return self.module(*args, **kwargs)",
        ),
        Mutant(
            "teachers-with-gradient",
            "        with torch.no_grad():\n            return",
            "        if True:\n            return",
        ),
        Mutant("teachers-copied", "return self  # a moving", "return Frozen(self.module)  # a moving"),
        tests=STEP,
    ),
    *of(
        "fgvc_ext/training/classification.py",
        Mutant(
            "classification-seed-lost",
            'self.model(batch["image"], batch["seed"])',
            'self.model(batch["image"])',
            tests=(f"{T}/test_task.py",),
        ),
        Mutant("classification-confused", "label * classes + predicted", "predicted * classes + label", tests=STEP),
        Mutant(
            "classification-one-crop",
            "for crop in images.unbind(1)]",
            "for crop in images.unbind(1)[:1]]",
            tests=TRAINER,
        ),
        Mutant(
            "classification-rate-of-new-layers",
            'return [{"params": old, "lr": config.lr}, {"params": new, "lr": rate}]',
            'return [{"params": old, "lr": rate}, {"params": new, "lr": rate}]',
            tests=TRAINER,
        ),
    ),
    *of(
        "fgvc_ext/training/device.py",
        Mutant("device-not-deterministic", "torch.use_deterministic_algorithms(engine.deterministic)", "pass"),
        Mutant("device-fp32-everywhere", 'return "bf16" if device.type', 'return "fp32" if device.type'),
        Mutant(
            "device-always-tf32",
            "torch.backends.cuda.matmul.allow_tf32 = engine.tf32",
            "torch.backends.cuda.matmul.allow_tf32 = True",
        ),
        tests=TRAINER,
    ),
    *of(
        "fgvc_ext/training/attention_transfer.py",
        Mutant(
            "transfer-relative-of-one-process", "sum_over_processes(own * n if n else torch.zeros_like(own))", "own * n"
        ),
        Mutant("transfer-relative-inverted", "self.alpha * both[0] / both[1]", "self.alpha * both[1] / both[0]"),
        Mutant(
            "transfer-nothing-shared",
            "torch.where(both[1] == 0, 0.0, self.alpha",
            "torch.where(both[1] < 0, 0.0, self.alpha",
        ),
        Mutant("transfer-logs-a-mean", "shared.detach() * answer", "shared.detach() * 1 or answer"),
        Mutant("transfer-accumulated", 'bool(teachers) and balance == "relative"', "False"),
        tests=("python_tests/training/test_attention_transfer.py",),
    ),
    *of(
        "fgvc_ext/training/combined.py",
        Mutant("combined-boosting-for-both", '= self.losses["entropy"]', "= self.loss"),
        Mutant("combined-first-epochs-boosted", "entropy if maps is None else maps", '{"loss": maps["loss"]}'),
        Mutant("combined-correct-of-one-head", "self.student.averaged(scores).detach()", "list(scores.values())[-1]"),
        Mutant(
            "combined-one-average-for-all",
            "average: self.student.averaged(heads, average)",
            "average: self.student.averaged(heads)",
        ),
        Mutant("combined-weight-forgotten", 'embedding["loss"], embedding["weight"]', 'embedding["loss"], 1.0'),
        Mutant("combined-one-head-has-averages", "if len(heads) > 1:", "if True:"),
        tests=("python_tests/training/test_combined_training.py",),
    ),
    *of(
        "fgvc_ext/training/members.py",
        Mutant("combined-one-model-needs-a-map", "if self.alpha > 0 and self.models > 1:", "if True:"),
        Mutant("combined-flag-of-another-driver", 'f"--{group}.no-teachers', 'f"--method.no-teachers'),
        tests=("python_tests/training/test_combined_driver.py", "-k", "errors or cached"),
    ),
    *of(
        "fgvc_ext/training/features.py",
        Mutant("combined-any-eyes-are-the-same", " or len({weights_hash(part) for part in backbones}) > 1", ""),
        Mutant("combined-ensembles-see-images", "if not frozen or len(views)", "if True or len(views)"),
        tests=("python_tests/training/test_combined_driver.py", "-k", "cached or layers"),
    ),
    *of(
        "train/combined.py",
        Mutant("combined-heads-off-decide-too", "if method.map_head else None", "if True else None"),
        Mutant("combined-average-is-no-setting", "average=config.method.average,", ""),
        Mutant("combined-block-of-any-map", "method.maps.for_maps(config.model, config.data.crop)", "method.maps"),
        tests=("python_tests/training/test_combined_driver.py", "-k", "switch or settings"),
    ),
    *of(
        "fgvc_ext/training/distributed.py",
        Mutant("training-sum-with-gradient", "total = values.detach()", "total = values"),
        tests=("python_tests/training/test_attention_transfer.py",),
    ),
    *of(
        "fgvc_ext/training/ensembles.py",
        Mutant(
            "ensembles-prefix-too-short",
            "scores[:n], average) for n in range(1",
            "scores[: max(1, n - 1)], average) for n in range(1",
        ),
        Mutant("ensembles-last-epoch-always", 'if epoch == "best_val" else', 'if epoch == "best" else'),
        tests=("python_tests/training/test_knowledge_transfer_driver.py",),
    ),
    *of(
        "fgvc_ext/training/members.py",
        Mutant("transfer-plain-is-taught", 'name.startswith("model") and self.alpha > 0', "self.alpha > 0"),
        Mutant("transfer-teachers-left-in", "taught and other not in self.no_teachers", "taught"),
        Mutant("transfer-seed-of-the-name", 'f"model {self.members()[name]}"', "name"),
        Mutant("transfer-is-its-own-teacher", "names[: n - 1]", "names[1 : n - 1]"),
        tests=("python_tests/training/test_knowledge_transfer_driver.py",),
    ),
]
