@echo off
rem Trains a LoRA: run_lora_train.bat --help
setlocal
cd /d "%~dp0"
set "python=python"
where /q py && set "python=py -3"
%python% scripts\start\set_up.py run_lora_train %*
exit /b %errorlevel%
