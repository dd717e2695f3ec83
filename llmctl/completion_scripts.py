"""Shell functions that ask the program itself what may come next, so that they never need to be written again.

With `_LLMCTL_COMPLETE` set, the program takes the words up to the cursor as its arguments and prints one
`kind<TAB>value<TAB>help` line for each that may stand in place of the last: `plain`, or `file` and `dir` for the shell.
"""

from __future__ import annotations

BASH = r"""# Completion of llmctl for bash, made by `llmctl completions bash`.
_llmctl() {
    local kind value
    COMPREPLY=()
    while IFS=$'\t' read -r kind value _; do
        case $kind in
            plain) COMPREPLY+=("$value") ;;
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
        esac
    done < <(_LLMCTL_COMPLETE=1 "$1" "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o nosort -F _llmctl llmctl
"""

ZSH = r"""#compdef llmctl
# Completion of llmctl for zsh, made by `llmctl completions zsh`.
_llmctl() {
    local kind value help
    local -a plain
    [[ $words[CURRENT] == -*=* ]] && compset -P '*='
    while IFS=$'\t' read -r kind value help; do
        case $kind in
            plain) plain+=("${value//:/\\:}${help:+:$help}") ;;
            file) _files ;;
            dir) _files -/ ;;
        esac
    done < <(_LLMCTL_COMPLETE=1 $words[1] "${(@Q)words[2,CURRENT]}" 2>/dev/null)
    (( $#plain )) && _describe -V llmctl plain
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _llmctl "$@"
else
    compdef _llmctl llmctl
fi
"""

FISH = r"""# Completion of llmctl for fish, made by `llmctl completions fish`.
function __llmctl_complete
    set -l before (commandline -opc)
    set -l current (commandline -ct)
    for line in (env _LLMCTL_COMPLETE=1 $before "$current" 2>/dev/null)
        set -l part (string split \t -- $line)
        switch $part[1]
            case plain
                printf '%s\t%s\n' $part[2] "$part[3]"
            case file
                __fish_complete_path "$current"
            case dir
                __fish_complete_directories "$current"
        end
    end
end
complete -c llmctl -f -a '(__llmctl_complete)'
"""

# Shell to the name its completion file has by custom, and the text.
SCRIPTS = {"bash": ("llmctl.bash", BASH), "zsh": ("_llmctl", ZSH), "fish": ("llmctl.fish", FISH)}
