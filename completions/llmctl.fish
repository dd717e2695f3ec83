# Completion of llmctl for fish, made by `llmctl completions fish`.
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
