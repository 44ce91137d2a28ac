@echo off
rem Draws images with a trained LoRA: run_lora_infer.bat --help
setlocal
cd /d "%~dp0"
set "python=python"
where /q py && set "python=py -3"
%python% scripts\start\set_up.py run_lora_infer %*
exit /b %errorlevel%
