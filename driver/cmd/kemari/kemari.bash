# Completion of kemari for bash. That of virsh needs nothing here: it asks virsh
# itself, and so finds --kemari and its options.

_kemari() {
	local cur words cword
	_get_comp_words_by_ref -n := -w words -i cword 2>/dev/null || {
		words=("${COMP_WORDS[@]}")
		cword=$COMP_CWORD
	}
	cur=${words[cword]}
	case ${words[cword - 1]} in
	--trigger) mapfile -t COMPREPLY < <(compgen -W 'output interval' -- "$cur") ;;
	--arbiter) mapfile -t COMPREPLY < <(compgen -W 'none' -- "$cur") ;;
	--connect | -c) mapfile -t COMPREPLY < <(compgen -W 'kemari:///system' -- "$cur") ;;
	*)
		# A word that begins with a dash is completed only if it is given.
		local args=("${words[@]:1:cword-1}")
		[[ $cur == -* ]] && args+=("$cur")
		mapfile -t COMPREPLY < <(compgen -W "$("${words[0]}" "${args[@]}" --generate-bash-completion 2>/dev/null)" -- "$cur")
		;;
	esac
	declare -F __ltrim_colon_completions >/dev/null && __ltrim_colon_completions "$cur"
	return 0
} && complete -o default -F _kemari kemari
