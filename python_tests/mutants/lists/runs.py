"""The life of a run: its folder and files, how it is stopped and goes on, what it says; and the driver of a paper."""

from ..mutant import Mutant, of

T = "python_tests/training"
FILES = (f"{T}/test_atomic_files.py", f"{T}/test_checkpoints.py", "-m", "not slow")
CHECKPOINTS = (f"{T}/test_checkpoints.py", f"{T}/test_resume.py", "-k", "checkpoint or damaged", "-m", "not slow")
GENERATORS = (f"{T}/test_checkpoints.py", f"{T}/test_resume.py", "-k", "seed or random or generators")
METRICS = (f"{T}/test_metrics.py", f"{T}/test_atomic_files.py")
LOCK = (f"{T}/test_run_lock.py",)
FIELDS = (f"{T}/test_continuation.py", "-k", "version or field or default or gone or difference")
EPOCHS = (f"{T}/test_continuation.py", "-k", "epochs or end or extended or other_settings or rates")
RESUME = (f"{T}/test_resume.py", "-m", "not slow", "-k", "refuse or changed")
STOPPING = (f"{T}/test_stopping.py", "-k", "first_signal")
REPORT = (f"{T}/test_stopping.py", "-k", "stops_the_report")
MEANS = (f"{T}/test_continuation.py", "-k", "means")
WEIGHTS = (f"{T}/test_weights_to_start_from.py",)
MESSAGES = (f"{T}/test_messages.py",)
DRIVER = (f"{T}/test_driver.py", f"{T}/test_subtle_differences_driver.py", "-m", "not slow", "-k", "folder or pasted")
PAPER = (
    f"{T}/test_subtle_differences_driver.py",
    "-m",
    "not slow",
    "-k",
    "ablations or reaches or ships or five_crops or stale or everything or repeats",
)

MUTANTS = [
    *of(
        "fgvc_ext/atomic_files.py",
        Mutant("atomic-content-not-synced", "os.fsync(raw.fileno())", "pass"),
        Mutant("atomic-name-not-synced", "_sync_folder(file.parent)", "pass"),
        Mutant("atomic-any-error-of-a-folder", "if error.errno not in _NOT_FOR_FOLDERS:", "if False:"),
        Mutant("atomic-no-error-of-a-folder", "if error.errno not in _NOT_FOR_FOLDERS:", "if True:"),
        Mutant("atomic-half-a-file-stays", "temporary.unlink(missing_ok=True)", "pass"),
        Mutant("atomic-in-place", "os.replace(temporary, file)", "file.write_bytes(temporary.read_bytes())"),
        Mutant("atomic-users-files-removed", '_UNFINISHED = ".fgvc_ext-unfinished"', '_UNFINISHED = ".tmp"'),
        tests=FILES,
    ),
    *of(
        "fgvc_ext/training/checkpoints.py",
        Mutant("checkpoints-oldest-first", "reverse=True)", ")"),
        Mutant("checkpoints-names-that-begin-alike", "if stage_of(file) == self.stage", "if self.stage in file.stem"),
        Mutant("checkpoints-one-more", "self.manifests()[self.keep :]", "self.manifests()[self.keep + 1 :]"),
        Mutant("checkpoints-orphans-stay", "file.unlink(missing_ok=True)\n\n", "pass\n\n"),
        Mutant("checkpoints-named-one-discarded", "manifest.stem > file.stem", "manifest.stem >= file.stem"),
        Mutant("checkpoints-hash-not-compared", 'if sha256 != manifest.get("sha256"):', "if False:"),
        Mutant("checkpoints-schema-not-compared", 'or manifest.get("schema") != SCHEMA', ""),
        Mutant(
            "checkpoints-code-executed",
            'map_location="cpu", weights_only=True',
            'map_location="cpu", weights_only=False',
        ),
        tests=CHECKPOINTS,
    ),
    *of(
        "fgvc_ext/training/random_state.py",
        Mutant("generators-python-not-restored", "random.setstate((python", "tuple((python"),
        Mutant("generators-numpy-not-restored", "np.random.set_state((numpy", "tuple((numpy"),
        Mutant("generators-python-not-seeded", "    random.seed(seed)\n", ""),
        Mutant("generators-numpy-not-seeded", "np.random.seed(seed % 2**32)", "pass"),
        Mutant("generators-gauss-forgotten", 'python["gauss"]))', "None))"),
        tests=GENERATORS,
    ),
    *of(
        "fgvc_ext/training/metrics.py",
        Mutant("metrics-not-synced", "os.fsync(stream.fileno())", "pass"),
        Mutant("metrics-cut-lines-stay", ' if line.endswith("\\n")]', "]"),
        Mutant("metrics-last-epoch-dropped", 'int(row["epoch"]) <= after', 'int(row["epoch"]) < after'),
        Mutant("metrics-other-stages-dropped", 'return row["stage"] != stage or int', "return int"),
        Mutant(
            "metrics-json-lines-doubled", "in self._objects() if _stays(row, stage, after))),", "in self._objects())),"
        ),
        Mutant("metrics-at-the-end", "place = own[-1] + 1 if own else len(rows)", "place = len(rows)"),
        tests=METRICS,
    ),
    *of(
        "fgvc_ext/training/run_lock.py",
        Mutant(
            "lock-of-a-removed-file", "if os.fstat(stream.fileno()).st_ino == os.stat(self.file).st_ino:", "if True:"
        ),
        Mutant("lock-shared", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        Mutant("lock-of-a-fork", "os.register_at_fork(after_in_child=_forget_in_child)", ""),
        Mutant(
            "lock-of-others-removed",
            "if self._stream is not None:\n            self.file.unlink",
            "if True:\n            self.file.unlink",
        ),
        tests=LOCK,
    ),
    *of(
        "fgvc_ext/training/run_folder.py",
        Mutant("folder-locked-after-an-error", "self._lock.release()\n            raise", "raise", tests=LOCK),
        Mutant("folder-stopped-is-failed", 'getattr(error, "status", "failed")', '"failed"', tests=STOPPING),
        Mutant("folder-refused-is-failed", "if self._begun:  #", "if True:  #"),
        Mutant("folder-done-without-its-file", "file.is_file() and file_sha256(file) == sha256", "file.is_file()"),
        Mutant("folder-never-is-auto", 'if self.resume == "never" and there:', "if False:"),
        Mutant("folder-foreign-checkpoint", "if file.resolve().parent != self.checkpoints.resolve():", "if False:"),
        Mutant("folder-left-overs-stay", "remove_unfinished(folder)", "pass", tests=FILES),
        Mutant("folder-means-not-compared", "if before[name] != now[name]]", "if False]", tests=MEANS),
        Mutant(
            "folder-any-run-is-this",
            "before is not None and not differences",
            "before is None or not differences",
            tests=(f"{T}/test_driver.py", f"{T}/test_continuation.py", "-k", "default_folder"),
        ),
        Mutant(
            "folder-epochs-of-run-json",
            'max(entry.get("epoch", 0), self.checkpoints_of(name).newest_epoch())',
            'entry.get("epoch", 0)',
            tests=EPOCHS,
        ),
        tests=RESUME,
    ),
    *of(
        "fgvc_ext/training/config.py",
        Mutant("config-new-field-refused", "old.get(name, defaults.get(name, absent))", "old.get(name, absent)"),
        Mutant("config-gone-field-forgotten", "new.get(name, absent)) for", "new.get(name, old.get(name))) for"),
        Mutant("config-default-of-the-value", "found[entry.name] = entry.default\n", "found[entry.name] = value\n"),
        Mutant("config-device-is-a-difference", '    "engine.device",\n', ""),
        Mutant(
            "config-nan-is-at-least",
            "not value >= limit",
            "value < limit",
            tests=(f"{T}/test_subtle_differences_driver.py", "-k", "one_clear_line"),
        ),
        tests=FIELDS,
    ),
    *of(
        "fgvc_ext/training/continuation.py",
        Mutant("continuation-end-at-what-is-trained", "elif now[EPOCHS] <= trained:", "elif now[EPOCHS] < trained:"),
        Mutant("continuation-cosine", 'ENDLESS = ("step", "constant")', 'ENDLESS = ("step", "constant", "cosine")'),
        Mutant("continuation-hash-with-the-end", " if not (endless and name == EPOCHS)})", "})"),
        Mutant(
            "continuation-other-differences-too",
            '[line.partition(":")[0] for line in lines] != [EPOCHS]',
            'EPOCHS not in [line.partition(":")[0] for line in lines]',
        ),
        tests=EPOCHS,
    ),
    *of(
        "fgvc_ext/training/stages.py",
        Mutant(
            "runs-hash-of-a-newer-version",
            "stage_hash(run.identity_of(stage.name))",
            "stage_hash(stage_identity(stage, run, engine, earlier))",
            tests=FIELDS,
        ),
        Mutant(
            "runs-moved-end-is-done",
            " and not is_moved(run.identity_of(stage.name), now)",
            "",
            survives="What was made of the earlier result is compared with that result, which is still there.",
        ),
        Mutant(
            "runs-main-alone-reopens",
            "run.data = distributed.on_main(_reopen",
            "distributed.on_main(_reopen",
            tests=(f"{T}/test_continuation.py", "-k", "processes_agree"),
        ),
        Mutant(
            "runs-checkpoints-of-a-lost-run",
            "distributed.on_main(_clear, stage.name, run)",
            "pass",
            tests=(f"{T}/test_stages.py", "-k", "lost_run_file"),
        ),
        tests=EPOCHS,
    ),
    *of(
        "fgvc_ext/training/trainer.py",
        Mutant(
            "runs-lines-doubled",
            "self.run.metrics.drop(self.name, after=self.at.epoch)",
            "pass",
            tests=(f"{T}/test_killed_at_named_points.py", "-k", "line"),
        ),
    ),
    *of(
        "fgvc_ext/training/stop_request.py",
        Mutant("stop-second-ctrl-c", "if number == signal.SIGINT and self.received is not None:", "if False:"),
        Mutant("stop-ctrl-c-not-caught", "(signal.SIGTERM, signal.SIGINT)", "(signal.SIGTERM,)"),
        Mutant("stop-handlers-stay", "signal.signal(number, handler)", "pass"),
        Mutant("stop-inner-context-ends-it", "if self._depth == 0:", "if True:"),
        Mutant("stop-one-that-came-before", "self._raise_if_received()\n            yield", "yield"),
        tests=(f"{T}/test_stopping.py", "-k", "put_back or first_ctrl or arrives"),
    ),
    *of(
        "fgvc_ext/training/driver.py",
        Mutant("driver-report-does-not-listen", 'with stop.at_once("the report"):', "if True:", tests=REPORT),
        Mutant("driver-exit-code", "else EXIT_PREEMPTED", "else 0", tests=STOPPING),
        Mutant(
            "driver-stopped-report-has-failed",
            "        except Preempted:\n            raise\n",
            "",
            tests=REPORT,
        ),
        Mutant("driver-memory", "if is_out_of_memory(error):", "if False:", tests=MESSAGES),
        Mutant("driver-any-unfinished-run", " and wanted(folder).is_of(found)", "", tests=DRIVER),
        Mutant("driver-finished-run-again", 'found.get("status") != "finished" and', "", tests=DRIVER),
        Mutant("driver-oldest-folder", "return newest if", "return config.out if", tests=DRIVER),
        Mutant("driver-forces-again", '("--resume", "--force-stage")', '("--resume",)', tests=DRIVER),
    ),
    *of(
        "fgvc_ext/training/messages.py",
        Mutant("messages-bugs-in-one-line", 'ours and dis.opname[frame.co_code[position]] == "RAISE_VARARGS"', "ours"),
        Mutant("messages-bugs-of-others", "return ours and", "return"),
        Mutant("messages-memory-of-a-cpu", '"can\'t allocate memory" in str(error)', '"out of memory" in str(error)'),
        Mutant("messages-warnings-of-others", "if category is UserWarning and", "if"),
        tests=MESSAGES,
    ),
    *of(
        "fgvc_ext/training/subtle_differences.py",
        Mutant("subtle-loss-from-the-start", '"from_epoch": self.gce_from_epoch', '"from_epoch": 0'),
        Mutant("subtle-always-boosting", "if not self.gce:", "if False:"),
        Mutant("subtle-k-forgotten", "EntropyLoss(k=self.k)", "EntropyLoss()"),
        Mutant("subtle-alpha-forgotten", '"patch_size", "alpha")', '"patch_size")'),
        tests=PAPER,
    ),
    *of(
        "train/subtle_differences.py",
        Mutant("subtle-ships-the-plain-network", '{"plain": MethodConfig(', '{**methods, "plain": MethodConfig('),
        Mutant("subtle-always-five-crops", " if config.five_crop else {}", ""),
        tests=PAPER,
    ),
    *of(
        "fgvc_ext/training/classifier_stage.py",
        Mutant("classifier-method-is-no-difference", '"method": method, ', ""),
        Mutant("classifier-weights-are-no-input", '"inputs": config.model.inputs(config.out)', '"inputs": {}', WEIGHTS),
        tests=PAPER,
    ),
]
