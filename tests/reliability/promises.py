"""What a run promises, each with the tests that fail when it is not so."""

from __future__ import annotations

from typing import NamedTuple


class Promise(NamedTuple):
    """A promise in one line, and its tests as ``file::name``, files below ``tests/``."""

    text: str
    tests: tuple[str, ...]


PROMISES: dict[str, Promise] = {
    "P1": Promise(
        "A resumed run is the uninterrupted one, bit for bit: weights, optimizer, schedule, random states, order of rows.",
        (
            "integration/test_resume.py::test_stopped_and_resumed_equals_uninterrupted",
            "integration/test_resume.py::test_a_forgotten_random_state_is_caught",
            "integration/test_dpo_resume.py::test_stopped_and_resumed_equals_uninterrupted",
        ),
    ),
    "P2": Promise("A kill at any instant leaves a whole checkpoint, and none that was complete is lost.", (
        "unit/test_checkpoints.py::test_a_death_or_a_full_disk_at_any_stage_leaves_the_earlier_checkpoint",
        "unit/test_checkpoints.py::test_a_deletion_cut_short_leaves_no_half_checkpoint",
        "integration/test_kill_drill.py::test_twenty_kills",
    )),
    "P3": Promise(
        "Content is on the disk before its name is, and the name before the manifest counts: a power cut finds no half file.",
        (
            "unit/test_storage.py::test_content_is_flushed_before_it_takes_its_name_and_the_name_after",
            "unit/test_storage.py::test_a_folder_is_flushed_file_by_file_before_it_takes_its_name",
            "unit/test_checkpoints.py::test_weights_are_on_disk_before_the_manifest_names_them",
        ),
    ),
    "P4": Promise(
        "SIGTERM finishes the step, saves and exits with 143, Ctrl-C with 130; a second one damages nothing.",
        (
            "integration/test_resume.py::test_a_fresh_process_goes_on_exactly",
            "unit/callbacks/test_checkpoint.py::test_a_noted_signal_saves_the_step_and_leaves",
            "unit/test_interrupts.py::test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not",
        ),
    ),
    "P5": Promise(
        "A cluster's notice (SIGUSR1) saves and exits with 143; a launcher's own handler stays, and Lightning's never starts.",
        (
            "unit/test_interrupts.py::test_the_notice_of_a_cluster_means_what_sigterm_means",
            "unit/test_interrupts.py::test_a_launchers_own_handler_of_the_notice_stays",
        ),
    ),
    "P6": Promise(
        "A loss or gradient that is not finite stops before the update and names step and rows; no such weight is ever saved.",
        (
            "unit/modules/test_sft.py::test_nan_stops_the_run_before_the_update_and_names_step_and_rows",
            "unit/modules/test_sft.py::test_scaler_skips_are_counted_and_too_many_stop_the_run",
            "unit/test_checkpoints.py::test_a_weight_that_is_not_finite_is_not_written",
        ),
    ),
    "P7": Promise(
        "Where memory runs out the step is done again in halves with the same result; at one row the error says what to change.",
        (
            "integration/test_memory_runs_out.py::test_the_step_is_done_again_in_halves_with_the_same_result",
            "integration/test_memory_runs_out.py::test_what_a_failed_attempt_left_behind_would_be_seen",
            "integration/test_memory_runs_out.py::test_a_single_row_that_does_not_fit_ends_the_run_with_what_to_change",
        ),
    ),
    "P8": Promise(
        "A disk that is full at any byte leaves the earlier checkpoint and one message; what cannot fit is told before it starts.",
        (
            "reliability/test_small_faults.py::test_a_disk_that_is_full_at_any_byte_leaves_the_earlier_checkpoint",
            "unit/test_storage.py::test_a_full_disk_is_one_message_and_the_old_file_stays",
            "unit/preflight/test_machine.py::test_the_disk_must_hold_the_checkpoints_that_are_kept",
        ),
    ),
    "P9": Promise("Damaged rows are all told, with file, line and reason, before training.", (
        "unit/data/test_readers.py::test_damage_is_named_with_file_and_place",
        "unit/data/test_readers.py::test_damage_is_reported_together_up_to_a_limit",
    )),
    "P10": Promise(
        "A missing column, a wrong type or an empty text is a named and counted reason: read = kept + dropped.",
        (
            "unit/data/test_sources.py::test_chat_rows_of_another_form_are_rejected_by_name",
            "unit/data/test_prepare.py::test_rows_become_tables_with_a_ledger_that_adds_up",
            "unit/data/test_ledger.py::test_check_finds_a_row_and_a_token_that_are_not_accounted_for",
        ),
    ),
    "P11": Promise("A row without a learned token never reaches the loss.", (
        "unit/text/test_overflow.py::test_a_row_without_a_learned_token_is_never_kept_even_if_it_fits",
        "unit/data/test_ledger.py::test_no_training_row_left_is_refused_whatever_the_share",
    )),
    "P12": Promise(
        "What is cut is what the config says, every cut token is counted, and an end that was cut is not learned.",
        (
            "unit/text/test_overflow.py::test_no_token_is_lost_without_being_counted",
            "unit/text/test_overflow.py::test_truncate_completion_loses_the_end_of_turn",
            "unit/text/test_overflow_pairs.py::test_no_token_is_lost_without_being_counted",
        ),
    ),
    "P13": Promise("No prompt is both trained on and validated with, and repeated pairs are found.", (
        "unit/data/test_split.py::test_train_and_validation_never_share_a_group_and_lose_no_row",
        "unit/data/test_prepare.py::test_rows_of_one_prompt_stay_on_one_side",
        "unit/data/test_pair_overlap.py::test_a_training_pair_that_validates_under_another_group_gives_way",
    )),
    "P14": Promise(
        "Any table of message trees ends in threads: every message is used, or counted once under a reason.",
        (
            "unit/data/test_oasst1.py::test_every_message_is_used_or_counted_once_whatever_the_parents",
            "unit/data/test_oasst1.py::test_orphans_cycles_self_parents_duplicates_and_missing_ids_each_have_a_reason",
            "unit/data/test_oasst1.py::test_a_deep_chain_does_not_reach_the_recursion_limit",
        ),
    ),
    "P15": Promise("A run does not go on with another tokenizer, template, base or other rows.", (
        "unit/test_starting.py::test_a_changed_fingerprint_refuses_to_go_on_and_names_it",
        "unit/text/test_encode.py::test_the_fingerprint_of_a_tokenizer_changes_with_what_decides_ids",
    )),
    "P16": Promise("An adapter of another base is refused, though the shapes fit.", (
        "unit/models/test_adapter_folder.py::test_another_base_is_refused_before_anything_is_loaded",
        "unit/models/test_fingerprint.py::test_copies_agree_and_another_seed_does_not",
        "integration/test_resume.py::test_another_base_of_the_same_shape_is_refused",
    )),
    "P17": Promise(
        "One flipped bit is found in checkpoints, adapters, prepared rows and stored references; an older checkpoint is taken.",
        (
            "unit/test_checkpoints.py::test_one_flipped_bit_is_found",
            "unit/models/test_adapter_folder.py::test_a_flipped_bit_of_an_adapter_is_found",
            "unit/test_reference_store.py::test_a_single_flipped_bit_is_refused",
            "unit/data/test_cache.py::test_a_damaged_entry_is_not_found_and_is_replaced",
            "integration/test_resume.py::test_a_damaged_newest_checkpoint_is_passed_over",
        ),
    ),
    "P18": Promise(
        "A mistyped, unknown or ill-typed key is refused, with what was probably meant, all of them at once.",
        (
            "configs/test_mistakes.py::test_each_mistake_gives_one_sentence",
            "configs/test_mistakes.py::test_all_mistakes_are_reported_together_and_none_hides_another",
        ),
    ),
    "P19": Promise(
        "A GPU that is not there, or a precision that it lacks, is refused by name with what to pass instead.",
        (
            "unit/test_device.py::test_a_gpu_that_is_not_there_is_refused",
            "unit/test_device.py::test_precision_that_the_device_lacks_is_refused_by_name",
        ),
    ),
    "P20": Promise("A package that is missing is told before anything is fetched.", (
        "unit/preflight/test_machine.py::test_every_missing_package_is_named_with_the_key_that_asks_for_it",
        "unit/models/test_quantized.py::test_a_missing_bitsandbytes_says_what_to_install",
    )),
    "P21": Promise(
        "A hub that does not answer is told within seconds, with the id and the two ways on; with a cache the run goes on.",
        (
            "reliability/test_small_faults.py::test_a_hub_that_does_not_answer_is_told_soon",
            "unit/models/test_hub.py::test_offline_without_a_cache_asks_nobody",
            "unit/data/test_readers.py::test_where_nothing_answers_the_cache_is_read",
        ),
    ),
    "P22": Promise(
        "A tracker that is down, slow or broken costs a bounded wait and one line; the run's own files are complete.",
        (
            "integration/test_tracking.py::test_an_unreachable_server_costs_a_bounded_wait_and_one_warning",
            "unit/tracking/test_mailbox.py::test_a_hang_holds_neither_steps_nor_the_end",
            "unit/tracking/test_mailbox.py::test_an_error_is_told_once_without_its_secret",
        ),
    ),
    "P23": Promise(
        "A folder is open in one process; a dead owner is forgotten; eight starts at one moment have eight folders.",
        (
            "unit/test_run_folder.py::test_a_folder_in_use_is_refused_and_a_dead_owner_is_forgotten",
            "reliability/test_parallel_starts.py::test_eight_starts_have_eight_folders",
            "reliability/test_parallel_starts.py::test_a_name_that_was_typed_is_opened_once",
        ),
    ),
    "P24": Promise(
        "Setting the clock changes nothing: steps are counted in manifests, durations on a clock that only goes forward.",
        (
            "reliability/test_small_faults.py::test_a_clock_that_was_set_changes_neither_durations_nor_the_choice_of_a_checkpoint",
            "reliability/test_small_faults.py::test_nothing_is_decided_by_the_time_of_day",
            "unit/test_checkpoints.py::test_the_latest_is_the_highest_step_whatever_the_clock_says",
            "unit/sweeps/test_record.py::test_a_job_is_done_by_what_this_start_saw",
        ),
    ),
    "P25": Promise(
        "Results are kept under everything that decides them: a change computes again, no change computes nothing.",
        (
            "integration/test_evaluate_again.py::test_what_is_there_is_not_computed_again",
            "integration/test_evaluate_again.py::test_a_changed_setting_computes_again",
            "integration/test_evaluate_again.py::test_a_changed_adapter_computes_again",
            "unit/data/test_prepare.py::test_whatever_decides_the_tables_misses_the_cache",
            "unit/evaluation/test_record.py::test_nothing_of_another_key_is_used",
        ),
    ),
    "P26": Promise("Checkpoints of every recorded release are gone on from, to the weights that they came to then.", (
        "reliability/test_earlier_releases.py::test_a_recorded_run_goes_on_as_it_did_then",
        "configs/test_resume.py::test_a_run_from_before_a_key_existed_goes_on",
    )),
    "P27": Promise(
        "A data worker that is killed ends the run soon with what to do, and the resumed run is the clean one.",
        (
            "integration/test_dead_worker.py::test_a_killed_worker_loses_no_step_that_was_saved",
            "integration/test_dead_worker.py::test_a_death_in_the_middle_of_a_step_is_told_in_a_sentence_as_well",
        ),
    ),
    "P28": Promise(
        "A place where no run can be is refused in one message before a weight is loaded; other names are names.",
        (
            "reliability/test_odd_places.py::test_where_no_run_can_be_is_told_before_a_weight_is_loaded",
            "reliability/test_odd_places.py::test_other_names_are_names",
            "reliability/test_odd_places.py::test_a_cache_that_cannot_be_is_told_in_the_same_message_as_the_folder",
            "unit/preflight/test_machine.py::test_a_place_that_cannot_be_written_is_refused",
        ),
    ),
}  # fmt: skip
