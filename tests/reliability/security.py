"""What no file, name or text from elsewhere can do, each with the tests that fail when it can."""

from __future__ import annotations

from .promises import Promise

SECURITY: dict[str, Promise] = {
    "S1": Promise(
        "Nothing is unpickled: code in checkpoints, adapters, caches and evaluations does not run (exit 10).",
        (
            "reliability/test_hostile_files.py::test_code_anywhere_in_a_trainer_state_does_not_run",
            "reliability/test_hostile_files.py::test_weights_in_a_pickle_are_refused_wherever_they_are_looked_for",
            "reliability/test_hostile_files.py::test_code_in_a_cache_or_an_evaluation_does_not_run",
            "unit/test_checkpoints.py::test_code_in_a_well_stamped_checkpoint_does_not_run",
            "unit/test_safe_calls.py::test_each_dangerous_call_has_one_place",
        ),
    ),
    "S2": Promise(
        "A weight file whose header lies is refused before a tensor is read, a link out of an adapter's folder as well.",
        (
            "reliability/test_hostile_files.py::test_a_header_that_lies_is_refused",
            "reliability/test_hostile_files.py::test_settings_that_are_no_object_are_refused",
            "reliability/test_hostile_files.py::test_a_link_out_of_an_adapters_folder_is_refused",
        ),
    ),
    "S3": Promise(
        "Code of a model's repository runs only by model.trust_remote_code, typed, from a pinned commit, and is told of.",
        (
            "reliability/test_hostile_files.py::test_code_of_a_models_folder_does_not_run_and_the_key_is_named",
            "reliability/test_hostile_configs.py::test_code_that_a_runs_own_config_asks_for_is_asked_of_the_user",
            "unit/models/test_hub.py::test_code_of_the_hub_comes_only_from_a_pinned_commit",
            "unit/models/test_hub.py::test_a_kernel_of_somebody_else_is_code_as_well",
            "unit/report/test_page.py::test_code_of_a_models_repository_is_told_in_the_head",
            "unit/pushing/test_card.py::test_code_of_the_bases_repository_is_told",
        ),
    ),
    "S4": Promise("A config names classes of a list, and nothing else becomes an object.", (
        "reliability/test_hostile_configs.py::test_a_hostile_target_is_refused_wherever_it_stands",
        "reliability/test_hostile_configs.py::test_nothing_of_hydras_own_names_a_class",
        "unit/test_targets.py::test_a_foreign_module_is_refused_before_it_is_imported",
        "unit/test_targets.py::test_nothing_else_turns_names_into_objects",
    )),
    "S5": Promise(
        "A config reads four variables of the environment and no others; a saved one is never interpolated.",
        (
            "reliability/test_hostile_configs.py::test_a_config_reads_no_secret_of_the_environment",
            "configs/test_resume.py::test_a_saved_config_is_data_and_is_never_interpolated",
        ),
    ),
    "S6": Promise(
        "Secrets are refused as words, and none is written or printed by training, evaluating or crashing.",
        (
            "reliability/test_secrets_everywhere.py::test_train_evaluate_and_a_crash_leave_none",
            "configs/test_secrets.py::test_it_is_refused_and_not_shown",
            "integration/test_tracking.py::test_no_secret_is_anywhere_under_the_run",
            "unit/pushing/test_push.py::test_a_file_with_a_secret_stops_the_push",
            "unit/test_redaction.py::test_running_text_keeps_no_named_secret_and_none_of_the_environment",
        ),
    ),
    "S7": Promise("Text of data, models and files acts in no page, card or terminal.", (
        "unit/report/test_hostile.py::test_no_element_and_no_attribute_comes_from_data",
        "unit/board/test_page.py::test_hostile_text_is_shown_and_does_nothing",
        "unit/audit/test_page.py::test_nothing_of_the_data_acts_in_the_page",
        "unit/pushing/test_card.py::test_hostile_text_shows_and_does_nothing",
        "reliability/test_hostile_files.py::test_an_error_acts_on_no_terminal_and_tells_no_secret",
        "unit/test_safe_calls.py::test_no_template_of_a_page_lets_text_act",
    )),
    "S8": Promise("No id, name or label becomes a path elsewhere.", (
        "reliability/test_hostile_configs.py::test_the_name_of_a_run_is_no_path",
        "unit/test_subjects.py::test_labels_are_names_with_as_many_folders_above_as_it_takes",
        "reliability/test_hostile_names.py::test_a_label_is_a_name_of_one_folder_below",
        "reliability/test_hostile_names.py::test_ids_of_rows_are_text_and_no_file",
        "unit/board/test_board.py::test_a_job_names_no_folder_outside",
    )),
    "S9": Promise("YAML of somebody else makes no object, never ends up larger than it is, and is read in no time.", (
        "reliability/test_hostile_configs.py::test_a_hostile_config_of_a_run_is_refused_in_no_time",
        "unit/report/test_reading.py::test_aliases_that_stand_for_more_text_than_memory_are_harmless",
    )),
    "S10": Promise("No cell of a spreadsheet is a formula.", (
        "reliability/test_hostile_names.py::test_no_cell_of_a_board_is_a_formula",
    )),
    "S11": Promise(
        "Releases that steal or run pickles cannot be installed beside this package, and are told of where they are.",
        (
            "reliability/test_small_faults.py::test_versions_that_steal_or_run_pickles_cannot_be_installed",
            "unit/doctor/test_versions.py::test_the_malicious_uploads_are_broken_and_told_once",
        ),
    ),
    "S12": Promise(
        "Templates and task files of somebody else are rendered in a sandbox and run nothing unless asked for.",
        (
            "unit/evaluation/test_lm_eval_refusals.py::test_a_file_that_would_run_code_is_refused_and_runs_none",
            "unit/evaluation/test_lm_eval_refusals.py::test_the_templates_of_a_task_file_cannot_reach_python",
            "unit/test_safe_calls.py::test_chat_templates_of_anybody_are_rendered_in_a_sandbox",
        ),
    ),
}  # fmt: skip
